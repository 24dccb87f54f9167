"""Reads the directory of a run: the rows of metrics.jsonl, status, options, warnings and scores. metrics.jsonl is
required. All other files may be missing, cut short or damaged, as a crash leaves them, and are then left out.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

# The fields of every row. Those that only some rows have are in Run.sometimes.
FIELDS = (
    *("micro_step", "loss", "ce", "kl", "lr", "grad_norm", "tokens", "tokens_per_s", "step_time_s"),
    *("teacher_wait_s", "data_wait_s", "skipped_updates", "mfu", "memory_gb"),
)
MAPS = ("own", "stream")
HELD_OUT = {"perplexity": "perplexity", "kl": "KL", "agreement": "agreement"}


class Series(NamedTuple):
    """Holds one value per optimizer step."""

    step: NDArray  # (n,)
    value: NDArray  # (n,); NaN where a row has none


class LayerErrors(NamedTuple):
    """Holds the layer maps of a run: how far each layer is from the teacher's."""

    step: NDArray  # (maps,)
    error: NDArray  # (layers, maps)


class Score(NamedTuple):
    """Holds a model's accuracy on MMLU, from a file that eval_mmlu_hybrid.py wrote."""

    file: str
    model: str
    acc: float
    stderr: float
    n: int  # questions
    step: float | None  # optimizer step, if the model is a checkpoint of this run


class Measure(NamedTuple):
    """Holds any other result of such a file: held-out text, retrieval or a task."""

    file: str
    model: str
    name: str
    value: float
    step: float | None


class RepeatedWarning(NamedTuple):
    """Counts a warning and those that differ from it in numbers alone."""

    text: str  # of the first one
    times: int
    ranks: tuple[int, ...]
    first: float  # seconds since the epoch
    last: float


@dataclass
class Run:
    """Holds all that the page shows of a run."""

    folder: Path
    name: str
    step: NDArray
    columns: dict[str, NDArray]  # by FIELDS
    sometimes: dict[str, dict[str, Series]]  # "eval" and "update_health", by their keys
    layer_maps: dict[str, LayerErrors]  # by those of MAPS that the run has
    is_cut: bool  # whether the last line of metrics.jsonl is cut short
    damaged: int  # lines before it that are not rows
    abandoned: int  # rows that were computed again after a resume
    written: float  # when the last row was written, in seconds since the epoch
    status: dict[str, Any]
    options: dict[str, Any]  # empty if they are not recorded
    warnings: list[RepeatedWarning]
    scores: list[Score]
    measures: list[Measure]

    def series(self, field: str) -> Series:
        return Series(self.step, self.columns[field])


def read_runs(folders: list[Path]) -> list[Run]:
    """Returns one run per directory; a directory named twice counts once. Raises ValueError if one is not a run's."""
    unique = list(dict.fromkeys(folder.resolve() for folder in folders))
    return [read_run(folder, name) for folder, name in zip(unique, distinct_names(unique), strict=True)]


def distinct_names(folders: list[Path]) -> list[str]:
    """Returns the directories' own names, preceded by as many parent directories as make all names distinct."""
    names = [folder.name or str(folder) for folder in folders]
    n = 1
    while len(set(names)) < len(names):
        n += 1
        names = ["/".join(folder.parts[-n:]) for folder in folders]
    return [name.encode(errors="replace").decode() for name in names]  # a file name may hold bytes that are not UTF-8


def read_run(folder: Path, name: str) -> Run:
    """Reads a run's directory. Raises ValueError if it has no metrics.jsonl, or no row in it."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        missing = "no metrics.jsonl in it" if folder.is_dir() else "no such directory"
        raise ValueError(f"RUN_DIR {folder}: {missing}; expected the --output_dir of a run of train_gpus.py")
    rows, is_cut, damaged = read_rows(file)
    if not rows:
        raise ValueError(f"RUN_DIR {folder}: metrics.jsonl has no row yet; come back after the first optimizer step")
    step = np.array([row["step"] for row in rows], dtype=float)
    columns = {field: np.array([finite_or_nan(row.get(field)) for row in rows]) for field in FIELDS}
    step_at = dict(zip(columns["micro_step"], step, strict=True))
    abandoned = folder / "metrics.abandoned.jsonl"
    return Run(
        folder=folder,
        name=name,
        step=step,
        columns=columns,
        sometimes={field: _inner_series(rows, field) for field in ("eval", "update_health")},
        layer_maps={kind: found for kind in MAPS if (found := _layer_errors(rows, kind))},
        is_cut=is_cut,
        damaged=damaged,
        abandoned=len(abandoned.read_bytes().splitlines()) if abandoned.is_file() else 0,
        written=file.stat().st_mtime,
        status=_dict_in(folder / "status.json"),
        options=read_options(folder),
        warnings=read_warnings(folder / "warnings.jsonl"),
        scores=read_scores(folder, step_at),
        measures=read_measures(folder, step_at),
    )


def read_rows(file: Path) -> tuple[list[dict[str, Any]], bool, int]:
    """Returns the rows by rising step, whether the last line is cut short, and how many other lines are not rows."""
    *lines, last = file.read_bytes().split(b"\n")
    found = [_parse_row(line) for line in [*lines, last] if line.strip()]
    is_cut = bool(last.strip()) and found[-1] is None
    by_step = {row["step"]: row for row in found if row is not None}  # the last row of a step counts
    return [by_step[step] for step in sorted(by_step)], is_cut, found.count(None) - is_cut


def _parse_row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and math.isfinite(finite_or_nan(row.get("step"))) else None


def finite_or_nan(value: Any) -> float:
    """Returns a number as it is, and NaN for null, infinity, anything else, and integers too large for a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def _inner_series(rows: list[dict[str, Any]], field: str) -> dict[str, Series]:
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if isinstance(row.get(field), dict):
            for key, value in row[field].items():
                points.setdefault(key, []).append((row["step"], finite_or_nan(value)))
    return {key: Series(*np.array(pairs, dtype=float).T) for key, pairs in points.items()}


def _layer_errors(rows: list[dict[str, Any]], kind: str) -> LayerErrors | None:
    maps = [(row["step"], row["layer_map"][kind]) for row in rows if _has_map(row.get("layer_map"), kind)]
    if not maps:
        return None
    error = np.full((max(len(column) for _, column in maps), len(maps)), math.nan)
    for i, (_, column) in enumerate(maps):
        error[: len(column), i] = [finite_or_nan(value) for value in column]
    return LayerErrors(np.array([step for step, _ in maps], dtype=float), error)


def _has_map(found: Any, kind: str) -> bool:
    return isinstance(found, dict) and isinstance(found.get(kind), list) and bool(found[kind])


# The files beside metrics.jsonl


def read_options(folder: Path) -> dict[str, Any]:
    """Returns the options in args.yaml, else those of the newest checkpoint that has any, else none."""
    try:
        options = yaml.safe_load((folder / "args.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        options = None
    if isinstance(options, dict):
        return {str(name): value for name, value in options.items()}
    states = [file for file in folder.glob("checkpoint-*/training_state.json") if _micro_step(file.parent) is not None]
    for file in sorted(states, key=lambda file: _micro_step(file.parent) or 0, reverse=True):
        if isinstance(options := _dict_in(file).get("arguments"), dict):
            return options
    return {}


def _micro_step(checkpoint: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(match[1]) if match else None


def read_warnings(file: Path) -> list[RepeatedWarning]:
    """Returns the warnings in their order. Those that differ in numbers alone are counted as one."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            warning = json.loads(line)
        except ValueError:  # cut short
            continue
        if isinstance(warning, dict) and isinstance(warning.get("text"), str):
            alike.setdefault(re.sub(r"\d+", "0", warning["text"]), []).append(warning)
    found = []
    for warnings in alike.values():
        times = [finite_or_nan(warning.get("time")) for warning in warnings]
        ranks = sorted({warning["rank"] for warning in warnings if isinstance(warning.get("rank"), int)})
        found.append(RepeatedWarning(warnings[0]["text"], len(warnings), tuple(ranks), min(times), max(times)))
    return found


def read_scores(folder: Path, step_at: dict[float, float]) -> list[Score]:
    """Returns the MMLU scores of all evaluations in the directory. step_at: optimizer step by micro step."""
    found = []
    for file, model, result in _results_in(folder):
        if not math.isnan(acc := finite_or_nan(result.get("acc"))):
            n, stderr = result.get("n"), finite_or_nan(result.get("stderr"))
            step = _step_of_checkpoint(result.get("config"), folder, step_at)
            found.append(Score(file, model, acc, stderr, n if isinstance(n, int) else 0, step))
    return found


def read_measures(folder: Path, step_at: dict[float, float]) -> list[Measure]:
    """Returns the other results of all evaluations in the directory. step_at: optimizer step by micro step."""
    found = []
    for file, model, result in _results_in(folder):
        step = _step_of_checkpoint(result.get("config"), folder, step_at)
        for name, value in _values_beside_mmlu(result):
            if not math.isnan(value := finite_or_nan(value)):
                found.append(Measure(file, model, name, value, step))
    return found


def _values_beside_mmlu(result: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields name and value. A task has only its first metric, the one that the task's authors list first."""
    for key, name in HELD_OUT.items():
        yield f"held-out {name}", _dict(result.get("held_out")).get(key)
    cells = result.get("retrieval")
    for cell in map(_dict, cells if isinstance(cells, list) else []):
        yield f"retrieval, {cell.get('length')} tokens, {cell.get('pairs')} pairs", cell.get("acc")
    for outcome in map(_dict, _dict(result.get("tasks")).values()):
        for task, figures in _dict(outcome.get("results")).items():
            for metric, value in list(_dict(figures).items())[:1]:
                yield f"{task}, {metric.removesuffix(',none')}", value


def _results_in(folder: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yields file name, model and the model's result."""
    for file in sorted(folder.glob("*.json")):
        content = _dict_in(file)
        config = content.get("config")
        single = {str(config.get("which")): content} if isinstance(config, dict) else {}
        results = content["models"] if isinstance(content.get("models"), dict) else single
        yield from ((file.name, model, result) for model, result in results.items() if isinstance(result, dict))


def _step_of_checkpoint(config: Any, folder: Path, step_at: dict[float, float]) -> float | None:
    """Returns the optimizer step of a scored checkpoint; None if it is not of a run in a directory of this name."""
    if not isinstance(config, dict) or not isinstance(config.get("ckpt"), str):
        return None
    checkpoint = Path(config["ckpt"])
    micro_step = _micro_step(checkpoint)
    if micro_step is None or checkpoint.parent.name != folder.name:
        return None
    return 0.0 if micro_step == 0 else step_at.get(micro_step)


def _dict_in(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; an empty one if the file is missing or holds something else."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return _dict(content)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
