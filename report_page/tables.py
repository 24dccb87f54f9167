"""Writes the numbers of a report as text: summary, scores, options and warnings of runs."""

import math
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arguments import TrainArguments
from inputs.option_values import PRESETS, preset_values
from inputs.options import default_values
from report_page.layer_errors import LAST_ROWS, Alignment
from report_page.lenient import content_of, dict_or_empty, finite_or_nan, parse_json
from report_page.run_data import Run
from report_page.series import share_of_time, smooth
from utils import format_duration

Table = list[list[str]]  # rows of cells, the first one is the head; no rows if there is nothing to show
MOST_WARNINGS = 50  # per run
NONE = "–"
DIRECTORY = "output_dir"  # differs between any two runs, and does not change what they compute
EVALUATION_LABELS = {"ce": "CE", "kl": "KL", "perplexity": "perplexity", "agreement": "agreement", "mmlu": "MMLU"}


def facts_of(run: Run) -> dict[str, str]:
    """Returns the summary by label, without what the run has no record of. Losses are those of the smoothed curves."""
    columns, found = run.columns, {}
    if "text" in run.status:
        found["Ended"] = str(run.status["text"])
    if text := _stage_before(run):
        found["Began from"] = text
    found["Started"] = _moment(finite_or_nan(run.status.get("launched")))
    found["Last row"] = _moment(run.written)
    found["Optimizer steps"] = f"{run.step[-1]:,.0f}"
    if isinstance(most := run.options.get("max_steps"), int):
        found["Optimizer steps"] += f" (--max_steps {most:,})"
    found["Tokens"] = _figure(_last(columns["tokens"]), "{:,.0f}")
    a_step = _median(np.diff(columns["tokens"]) / np.diff(run.step))
    found["Tokens"] += _figure(a_step, " ({:,.0f} per step)") if math.isfinite(a_step) else ""
    time = np.nansum(columns["step_time_s"])
    found["Time of steps"] = format_duration(time) if time else NONE
    for field, label in {"loss": "Loss", "ce": "CE", "kl": "KL"}.items():
        curve = smooth(run.series(field))
        if np.isfinite(curve.value).any():
            best = int(np.nanargmin(curve.value))
            found[label] = f"{_last(curve.value):.4f}, lowest {curve.value[best]:.4f} at step {curve.step[best]:,.0f}"
    if run.alignment is not None:
        found["Error of the layers"] = _errors_of_layers(run.alignment)
    found["Throughput, median"] = _figure(_median(columns["tokens_per_s"]), "{:,.0f} tokens/s")
    found["MFU, median"] = _figure(100 * _median(columns["mfu"]), "{:.1f}%")
    for field, label in {"teacher_wait_s": "Waiting for the teacher", "data_wait_s": "Waiting for data"}.items():
        if np.isfinite(share_of_time(run, field)).any():
            found[label] = f"{100 * np.nansum(columns[field]) / time:.1f}% of the time"
    peak = columns["memory_gb"][np.isfinite(columns["memory_gb"])]
    found["Peak memory, rank 0"] = f"{peak.max():.1f} GB" if peak.size else NONE
    found["Skipped updates"] = _figure(_last(columns["skipped_updates"]), "{:,.0f}")
    if last := _last_evaluation(run):
        found["Last evaluation"] = last
    return {label: text for label, text in found.items() if text != NONE}


def _errors_of_layers(alignment: Alignment) -> str:
    first, last = (
        {layer: error for layer, error in errors.items() if math.isfinite(error)}
        for errors in (alignment.first, alignment.last)
    )
    if not last:
        return NONE
    means = f"{fmean(first.values()):.4f} in the first step, {fmean(last.values()):.4f} at the end"
    worst = max(last, key=last.__getitem__)
    return f"{means}; the largest there is {last[worst]:.4f}, of layer {worst}"


def _stage_before(run: Run) -> str:
    """Returns the checkpoint that the student of the run is, if it is one of another run; else nothing."""
    student = run.options.get("student_model")
    if not isinstance(student, str):
        return ""
    state = dict_or_empty(parse_json(content_of(Path(student) / "training_state.json")))
    if not state:
        return ""
    stage, tokens = dict_or_empty(state.get("arguments")).get("stage"), finite_or_nan(state.get("tokens"))
    how = "aligned" if stage == "align" else "distilled"
    return f"{student}, {how}" + (f" with {tokens:,.0f} tokens" if math.isfinite(tokens) else "")


def _last_evaluation(run: Run) -> str:
    series = {
        label: run.sometimes["eval"][key] for key, label in EVALUATION_LABELS.items() if key in run.sometimes["eval"]
    }
    if not series:
        return ""
    step = max(found.step[-1] for found in series.values())
    figures = (
        f"{label} {_figure(found.value[-1], '{:.4g}')}" for label, found in series.items() if found.step[-1] == step
    )
    return f"step {step:,.0f}: {', '.join(figures)}"


def _last(values: NDArray) -> float:
    values = values[np.isfinite(values)]
    return values[-1] if values.size else math.nan


def _median(values: NDArray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if values.size else math.nan


def _figure(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else NONE


def _moment(seconds: float) -> str:
    if not math.isfinite(seconds):
        return NONE
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):  # outside the years of a datetime
        return NONE


# Tables


def summary_table(runs: Sequence[Run]) -> Table:
    """Returns the summaries side by side, one column per run."""
    facts = [facts_of(run) for run in runs]
    labels = dict.fromkeys(label for found in facts for label in found)
    rows = [[label, *(found.get(label, NONE) for found in facts)] for label in labels]
    return [["", *(run.name for run in runs)], ["Directory", *(str(run.folder) for run in runs)], *rows]


def scores_of_runs(runs: Sequence[Run]) -> Table:
    table = [["run", "model", "MMLU accuracy ± stderr", "questions", "step", "file"]]
    for run in runs:
        for score in run.scores:
            error = "" if math.isnan(score.stderr) else f" ± {score.stderr:.4f}"
            step = _figure(math.nan if score.step is None else score.step, "{:,.0f}")
            table.append([run.name, score.model, f"{score.acc:.4f}{error}", f"{score.n:,}", step, score.file])
    return _trimmed(runs, table)


def measure_table(runs: Sequence[Run]) -> Table:
    table = [["run", "model", "measure", "value", "step", "file"]]
    for run in runs:
        for found in run.measures:
            step = _figure(math.nan if found.step is None else found.step, "{:,.0f}")
            table.append([run.name, found.model, found.name, f"{found.value:.4f}", step, found.file])
    return _trimmed(runs, table)


def alignment_table(runs: Sequence[Run]) -> Table:
    """Returns what became of each aligned layer."""
    end = f"at the end (median of {LAST_ROWS} rows)"
    table = [["run", "layer", "error in the first step", end, "ratio"]]
    for run in runs:
        for layer, first in run.alignment.first.items() if run.alignment is not None else ():
            assert run.alignment is not None
            last = run.alignment.last[layer]
            ratio = last / first if first > 0 else math.nan
            table.append([run.name, str(layer), *(_figure(value, "{:.4f}") for value in (first, last, ratio))])
    return _trimmed(runs, table)


def warning_table(runs: Sequence[Run]) -> Table:
    table = [["run", "warning", "times", "ranks", "first", "last"]]
    for run in runs:
        for warned in run.warnings[:MOST_WARNINGS]:
            ranks = ", ".join(map(str, warned.ranks)) or NONE
            table.append(
                [run.name, warned.text, f"{warned.times:,}", ranks, _moment(warned.first), _moment(warned.last)]
            )
        if len(run.warnings) > MOST_WARNINGS:
            more = f"and {len(run.warnings) - MOST_WARNINGS} more kinds, in warnings.jsonl"
            table.append([run.name, more, NONE, NONE, NONE, NONE])
    return _trimmed(runs, table)


def _trimmed(runs: Sequence[Run], table: Table) -> Table:
    """Returns the table without the runs' names if there is only one run, and nothing if it has no row but its head."""
    if len(table) == 1:
        return []
    return [row[1:] for row in table] if len(runs) == 1 else table


def option_tables(runs: Sequence[Run]) -> dict[str, Table]:
    """Returns tables by title: options in which the runs differ, options changed from their defaults, and all options.
    Returns none if no run has its options recorded.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.options))
    if not names:
        return {}
    head = ["option", *(run.name for run in runs)] if len(runs) > 1 else ["option", "value"]
    rows = {name: [name, *(_value(run.options, name) for run in runs)] for name in names}
    tables: dict[str, Table] = {}
    if len(runs) > 1:
        differing = [row for name, row in rows.items() if len(set(row[1:])) > 1 and name != DIRECTORY]
        tables["Different between the runs"] = [head, *differing]
    defaults = [defaults_of(run.options) for run in runs]
    pairs = [(run.options, usual) for run, usual in zip(runs, defaults, strict=True) if run.options]
    changed = [name for name in names if any(_value(own, name) != _value(usual, name) for own, usual in pairs)]
    usually = {name: " / ".join(dict.fromkeys(_value(usual, name) for usual in defaults)) for name in names}
    special = [[*rows[name], usually[name]] for name in changed if name != DIRECTORY]
    tables["Changed from the defaults and the preset"] = [[*head, "default"], *special]
    tables[f"All {len(names)} options"] = [head, *rows.values()]
    return tables


def defaults_of(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of all options of training if only the preset of `options` were given."""
    values, preset = default_values(TrainArguments), str(options.get("preset", TrainArguments.preset))
    if preset not in {file.parent.name for file in PRESETS.glob("*/preset.json")}:  # it is of another version
        return values
    return {**values, **preset_values(preset, TrainArguments, "train"), "preset": preset}


def _value(options: dict[str, Any], name: str) -> str:
    value = options.get(name)
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return NONE if value is None else str(value)
