"""What a run directory tells: the rows of metrics.jsonl as columns, how the run stands, its options, its warnings and
the scores of its evaluations. metrics.jsonl has to be there; all else may be missing, cut short or damaged, as a crash
leaves it, and is then left out.
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

# Of every row. Those that stand in some rows only are Run.sometimes.
FIELDS = (
    *("micro_step", "loss", "ce", "kl", "lr", "grad_norm", "tokens", "tokens_per_s", "step_time_s"),
    *("teacher_wait_s", "data_wait_s", "skipped_updates", "mfu", "memory_gb"),
)
MAPS = ("own", "stream")
HELD_OUT = {"perplexity": "perplexity", "kl": "KL", "agreement": "agreement"}


class Series(NamedTuple):
    step: NDArray
    value: NDArray  # NaN where there is none


class LayerMap(NamedTuple):
    step: NDArray  # (maps,)
    error: NDArray  # (layers, maps)


class Score(NamedTuple):
    """Accuracy of a model on MMLU, from a file that eval_mmlu_hybrid.py wrote."""

    file: str
    model: str
    acc: float
    stderr: float
    n: int
    step: float | None  # of the run's checkpoint that was scored


class Measure(NamedTuple):
    """Anything else that such a file tells of a model."""

    file: str
    model: str
    name: str
    value: float
    step: float | None


class Warned(NamedTuple):
    """A warning and those that differ from it in numbers alone."""

    text: str  # of the first
    times: int
    ranks: tuple[int, ...]
    first: float  # seconds since the epoch
    last: float


@dataclass
class Run:
    folder: Path
    name: str
    step: NDArray
    columns: dict[str, NDArray]  # by FIELDS
    sometimes: dict[str, dict[str, Series]]  # "eval" and "update_health", by their keys
    layer_maps: dict[str, LayerMap]  # by MAPS, those that there are
    is_cut: bool  # whether the last line of metrics.jsonl is not whole
    damaged: int  # lines before it that are no rows
    abandoned: int  # rows that were computed again
    written: float  # when the last row was, in seconds since the epoch
    status: dict[str, Any]
    options: dict[str, Any]  # none where they are not recorded
    warnings: list[Warned]
    scores: list[Score]
    measures: list[Measure]

    def series(self, field: str) -> Series:
        return Series(self.step, self.columns[field])


def read_runs(folders: list[Path]) -> list[Run]:
    """Each directory once. Raises ValueError for what is no run directory."""
    unique = list(dict.fromkeys(folder.resolve() for folder in folders))
    return [read_run(folder, name) for folder, name in zip(unique, distinct_names(unique), strict=True)]


def distinct_names(folders: list[Path]) -> list[str]:
    """Of different directories: their own names, with as many of those above them as it takes to tell them apart."""
    names = [folder.name or str(folder) for folder in folders]
    n = 1
    while len(set(names)) < len(names):
        n += 1
        names = ["/".join(folder.parts[-n:]) for folder in folders]
    return [name.encode(errors="replace").decode() for name in names]  # of bytes that are no text


def read_run(folder: Path, name: str) -> Run:
    file = folder / "metrics.jsonl"
    if not file.is_file():
        missing = "no metrics.jsonl in it" if folder.is_dir() else "no such directory"
        raise ValueError(f"RUN_DIR {folder}: {missing}; expected the --output_dir of a run of train_gpus.py")
    rows, is_cut, damaged = read_rows(file)
    if not rows:
        raise ValueError(f"RUN_DIR {folder}: metrics.jsonl has no row yet; come back after the first optimizer step")
    step = np.array([row["step"] for row in rows], dtype=float)
    columns = {field: np.array([number(row.get(field)) for row in rows]) for field in FIELDS}
    step_at = dict(zip(columns["micro_step"], step, strict=True))
    abandoned = folder / "metrics.abandoned.jsonl"
    return Run(
        folder=folder,
        name=name,
        step=step,
        columns=columns,
        sometimes={field: _inner_series(rows, field) for field in ("eval", "update_health")},
        layer_maps={kind: found for kind in MAPS if (found := _layer_map(rows, kind))},
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
    """The rows by rising step, whether the last line is not whole, and how many other lines are no rows."""
    *lines, last = file.read_bytes().split(b"\n")
    found = [_row(line) for line in [*lines, last] if line.strip()]
    is_cut = bool(last.strip()) and found[-1] is None
    by_step = {row["step"]: row for row in found if row is not None}  # of a step that stands twice, what came last
    return [by_step[step] for step in sorted(by_step)], is_cut, found.count(None) - is_cut


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and math.isfinite(number(row.get("step"))) else None


def number(value: Any) -> float:
    """NaN for null, for infinity, for what is no number and for what is too large for one."""
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
                points.setdefault(key, []).append((row["step"], number(value)))
    return {key: Series(*np.array(pairs, dtype=float).T) for key, pairs in points.items()}


def _layer_map(rows: list[dict[str, Any]], kind: str) -> LayerMap | None:
    maps = [(row["step"], row["layer_map"][kind]) for row in rows if _has_map(row.get("layer_map"), kind)]
    if not maps:
        return None
    error = np.full((max(len(column) for _, column in maps), len(maps)), math.nan)
    for i, (_, column) in enumerate(maps):
        error[: len(column), i] = [number(value) for value in column]
    return LayerMap(np.array([step for step, _ in maps], dtype=float), error)


def _has_map(found: Any, kind: str) -> bool:
    return isinstance(found, dict) and isinstance(found.get(kind), list) and bool(found[kind])


# Beside metrics.jsonl


def read_options(folder: Path) -> dict[str, Any]:
    """From args.yaml, or as the newest checkpoint has them."""
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


def read_warnings(file: Path) -> list[Warned]:
    """Those that differ in numbers alone are one, in the order in which the first of each came."""
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
        times = [number(warning.get("time")) for warning in warnings]
        ranks = sorted({warning["rank"] for warning in warnings if isinstance(warning.get("rank"), int)})
        found.append(Warned(warnings[0]["text"], len(warnings), tuple(ranks), min(times), max(times)))
    return found


def read_scores(folder: Path, step_at: dict[float, float]) -> list[Score]:
    """Of all results of evaluations in the directory. step_at: optimizer step by micro step."""
    found = []
    for file, model, result in _results_in(folder):
        if not math.isnan(acc := number(result.get("acc"))):
            n, step = result.get("n"), _step_of_checkpoint(result.get("config"), folder, step_at)
            found.append(Score(file, model, acc, number(result.get("stderr")), n if isinstance(n, int) else 0, step))
    return found


def read_measures(folder: Path, step_at: dict[float, float]) -> list[Measure]:
    found = []
    for file, model, result in _results_in(folder):
        step = _step_of_checkpoint(result.get("config"), folder, step_at)
        named = ((name, number(value)) for name, value in _measures(result))
        found += [Measure(file, model, name, value, step) for name, value in named if not math.isnan(value)]
    return found


def _measures(result: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Of each task the first of its metrics, which the task's authors name first."""
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
    """File name, model and what was measured."""
    for file in sorted(folder.glob("*.json")):
        content = _dict_in(file)
        config = content.get("config")
        single = {str(config.get("which")): content} if isinstance(config, dict) else {}
        results = content["models"] if isinstance(content.get("models"), dict) else single
        yield from ((file.name, model, result) for model, result in results.items() if isinstance(result, dict))


def _step_of_checkpoint(config: Any, folder: Path, step_at: dict[float, float]) -> float | None:
    """None for a model that is no checkpoint of this run. The directory may have been moved, but not renamed."""
    if not isinstance(config, dict) or not isinstance(config.get("ckpt"), str):
        return None
    checkpoint = Path(config["ckpt"])
    micro_step = _micro_step(checkpoint)
    if micro_step is None or checkpoint.parent.name != folder.name:
        return None
    return 0.0 if micro_step == 0 else step_at.get(micro_step)


def _dict_in(file: Path) -> dict[str, Any]:
    """Empty if the file is not there, or holds something else."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return _dict(content)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
