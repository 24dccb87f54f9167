"""Reads the directory of a run: the rows of metrics.jsonl, status, options, warnings and scores. metrics.jsonl is
required. All other files may be missing, cut short or damaged, as a crash leaves them, and are then left out.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from report_page.evaluations import Measure, Score, micro_step_of, read_measures, read_scores
from report_page.layer_errors import Alignment, LayerErrors, alignment_in, layer_maps_in
from report_page.lenient import content_of, dict_or_empty, finite_or_nan, is_too_large, parse_json, parse_yaml

# The fields of every row. Those that only some rows have are in Run.sometimes.
FIELDS = (
    *("micro_step", "loss", "ce", "kl", "lr", "grad_norm", "tokens", "tokens_per_s", "step_time_s"),
    *("teacher_wait_s", "data_wait_s", "skipped_updates", "mfu", "memory_gb"),
)
MOST_STEPS = 2**53  # numbers up to here are exact as floats; a row beyond it is damaged


class Series(NamedTuple):
    """Holds one value per optimizer step."""

    step: NDArray  # (n,)
    value: NDArray  # (n,); NaN where a row has none


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
    alignment: Alignment | None  # of a run of the stage `align`
    is_cut: bool  # whether the last line of metrics.jsonl is cut short
    damaged: int  # lines before it that are not rows
    repeated: int  # rows that a later row of the same step replaces
    too_large: int  # numbers that no chart can show
    abandoned: int  # rows that were computed again after a resume
    written: float  # when the last row was written, in seconds since the epoch
    status: dict[str, Any]
    options: dict[str, Any]  # empty if they are not recorded
    warnings: list[RepeatedWarning]
    scores: list[Score]
    measures: list[Measure]

    @property
    def missing(self) -> int:
        """Returns how many steps between the first row and the last have none."""
        return int(self.step[-1] - self.step[0]) + 1 - len(self.step)

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
    try:
        rows, left_out, written = _read_metrics(folder)
    except OSError as error:
        raise ValueError(f"RUN_DIR {folder}: metrics.jsonl cannot be read ({error.strerror})") from error
    step = np.array([row["step"] for row in rows], dtype=float)
    columns = {field: np.array([finite_or_nan(row.get(field)) for row in rows]) for field in FIELDS}
    step_at = dict(zip(columns["micro_step"], step, strict=True))
    return Run(
        folder=folder,
        name=name,
        step=step,
        columns=columns,
        sometimes={field: _inner_series(rows, field) for field in ("eval", "update_health")},
        layer_maps=layer_maps_in(rows),
        alignment=alignment_in(rows),
        is_cut=left_out["cut"] > 0,
        damaged=left_out["damaged"],
        repeated=left_out["repeated"],
        too_large=sum(map(_count_too_large, rows)),
        abandoned=len(content_of(folder / "metrics.abandoned.jsonl").splitlines()),
        written=written,
        status=dict_or_empty(parse_json(content_of(folder / "status.json"))),
        options=read_options(folder),
        warnings=read_warnings(folder / "warnings.jsonl"),
        scores=read_scores(folder, step_at),
        measures=read_measures(folder, step_at),
    )


def _read_metrics(folder: Path) -> tuple[list[dict[str, Any]], Counter[str], float]:
    """Returns what `read_rows` does, and when the file was last written. Raises ValueError if there is no row, and
    OSError.
    """
    file = folder / "metrics.jsonl"
    if not file.is_file():
        missing = "no metrics.jsonl in it" if folder.is_dir() else "no such directory"
        runs = sorted(str(inner.parent) for inner in folder.glob("*/metrics.jsonl"))
        hint = f"; there is one in {', '.join(runs[:5])}" if runs else ""
        raise ValueError(f"RUN_DIR {folder}: {missing}; expected the --output_dir of a run of train_gpus.py{hint}")
    rows, left_out = read_rows(file.read_bytes())
    if not rows:
        damaged = f" ({left_out['damaged']} lines cannot be read)" if left_out["damaged"] else ""
        raise ValueError(
            f"RUN_DIR {folder}: metrics.jsonl has no row yet{damaged}; come back after the first optimizer step"
        )
    return rows, left_out, file.stat().st_mtime


def read_rows(content: bytes) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Returns the rows by rising step, and how many lines are not among them: "cut" (the last line, incomplete),
    "damaged" (others that are no rows) and "repeated" (the last row of a step counts).
    """
    *lines, last = content.split(b"\n")
    parsed = [_parse_row(line) for line in [*lines, last] if line.strip()]
    is_cut = bool(last.strip()) and parsed[-1] is None
    by_step = {row["step"]: row for row in parsed if row is not None}
    n_damaged = parsed.count(None)
    repeated = len(parsed) - n_damaged - len(by_step)
    return [by_step[step] for step in sorted(by_step)], Counter(
        cut=int(is_cut), damaged=n_damaged - is_cut, repeated=repeated
    )


def _parse_row(line: bytes) -> dict[str, Any] | None:
    row = parse_json(line)
    is_row = isinstance(row, dict) and 0 <= (step := finite_or_nan(row.get("step"))) <= MOST_STEPS and step % 1 == 0
    return row if is_row else None


def _count_too_large(row: dict[str, Any]) -> int:
    parts = [row, *(dict_or_empty(row.get(name)) for name in ("eval", "update_health", "layer_map", "alignment"))]
    values = (value if isinstance(value, list) else [value] for part in parts for value in part.values())
    return sum(is_too_large(value) for found in values for value in found)


def _inner_series(rows: list[dict[str, Any]], field: str) -> dict[str, Series]:
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if isinstance(row.get(field), dict):
            for key, value in row[field].items():
                points.setdefault(key, []).append((row["step"], finite_or_nan(value)))
    return {key: Series(*np.array(pairs, dtype=float).T) for key, pairs in points.items()}


# The files beside metrics.jsonl


def read_options(folder: Path) -> dict[str, Any]:
    """Returns the options in args.yaml, else those of the newest checkpoint that has any, else none."""
    if isinstance(options := parse_yaml(content_of(folder / "args.yaml")), dict):
        return _plain(options)
    states = {micro_step_of(file.parent): file for file in folder.glob("checkpoint-*/training_state.json")}
    for _, file in sorted(((step, file) for step, file in states.items() if step is not None), reverse=True):
        if isinstance(options := dict_or_empty(parse_json(content_of(file))).get("arguments"), dict):
            return _plain(options)
    return {}


def _plain(options: dict[Any, Any]) -> dict[str, Any]:
    """Returns those options whose values an option can have: one value, or a list of such."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    return {
        str(name): options[name]
        for name, values in lists.items()
        if not any(isinstance(value, (list, dict, set)) or is_too_large(value) for value in values)
    }


def read_warnings(file: Path) -> list[RepeatedWarning]:
    """Returns the warnings in their order. Those that differ in numbers alone are counted as one."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for line in content_of(file).splitlines():
        warning = parse_json(line)  # None for a line that is cut short
        if isinstance(warning, dict) and isinstance(warning.get("text"), str):
            alike.setdefault(re.sub(r"\d+", "0", warning["text"]), []).append(warning)
    found = []
    for warnings in alike.values():
        times = [finite_or_nan(warning.get("time")) for warning in warnings]
        ranks = sorted({warning["rank"] for warning in warnings if isinstance(warning.get("rank"), int)})
        found.append(RepeatedWarning(warnings[0]["text"], len(warnings), tuple(ranks), min(times), max(times)))
    return found
