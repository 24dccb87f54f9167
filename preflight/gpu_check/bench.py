"""The part `bench` of `make gpu-check`: benchmarks/bench_gpu.py in its short form, and what it says about this GPU."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from preflight.checks.basics import FAILURE, OK, WARNING
from preflight.gpu_check.children import Child, last_lines
from preflight.gpu_check.results import NO_GPU_HERE, NOT_APPLICABLE, Result, Session, table

if TYPE_CHECKING:
    from collections.abc import Iterator

Row = dict[str, Any]

SECTIONS = ("card", "scan", "loss", "step", "profile")
SCRIPT = "benchmarks/bench_gpu.py"
AIM = 0.45  # MFU of a step of 8B shapes
# Columns of the tables, by the names of the rows' values.
COLUMNS = {
    "case": "case",
    "candidate": "candidate",
    "seconds": "ms",
    "ratio_to_baseline": "ratio",
    "peak_bytes": "memory, GB",
    "planned_bytes": "planned, GB",
    "tokens_per_s": "tokens/s",
    "mfu": "MFU",
    "teacher_wait_s": "waiting for the teacher, ms",
    "n_layer": "layers",
    "share": "share",
    "relative_error": "error",
    "loss_error": "loss error",
    "gradient_error": "gradient error",
    "GB_per_s": "GB/s",
    "TFLOP_per_s": "TFLOP/s",
    "note": "note",
}


def check(session: Session) -> Iterator[Result]:
    """Runs the benchmark, and yields what each of its sections found."""
    log, file = session.work / "bench.log", session.work / "bench.json"
    command = [sys.executable, str(SCRIPT), "--json", str(file)]
    command += ["--short", "--time_limit", f"{session.seconds_left:.0f}"]
    command += [] if session.n_gpus else ["--device", "cpu", "--quick"]
    if session.is_late:
        yield Result.left_out("bench", "bench")
        return
    problem = Child(command, log).wait(session.seconds_left + 15)  # it keeps to its own limit
    rows = json.loads(file.read_text()) if file.exists() else []
    if not session.n_gpus:
        yield Result(NOT_APPLICABLE, "speed of a GPU", f"{NO_GPU_HERE}; the same code ran at tiny sizes")
    for section in SECTIONS:
        if of_section := [row for row in rows if row["section"] == section]:
            yield judge(section, of_section, command, on_gpu=bool(session.n_gpus))
    if problem is not None and not any("error" in row for row in rows):
        remedy = f"python {' '.join(command[1:])}"
        yield Result(FAILURE, "bench_gpu.py", problem, remedy, last_lines(log))


def judge(section: str, rows: list[Row], command: list[str], on_gpu: bool) -> Result:
    """Returns the finding on a section's rows."""
    figures = rows_as_table(rows) if on_gpu else []
    errors = [f"{row['case']}, {row['candidate']}: {row['error']}" for row in rows if "error" in row]
    if errors:
        remedy = f"python {' '.join(command[1:])} --sections {section}"
        return Result(FAILURE, section, errors[0], remedy, errors[1:], figures)
    if not on_gpu:
        return Result(OK, section, f"{len(rows)} rows, a trial")
    if section == "step":
        return judge_step(rows, figures)
    return Result(OK, section, in_words(section, rows), figures=figures)


def judge_step(rows: list[Row], figures: list[str]) -> Result:
    """Returns the finding on steps: their share of the rate that this GPU reaches, and memory against the plan."""
    best = max(rows, key=lambda row: row["mfu"])
    found = f"{best['tokens_per_s']} tokens/s, MFU {best['mfu']:.2f} of the measured matrix rate ({best['case']})"
    beyond = [row for row in rows if row.get("planned_bytes") and row["peak_bytes"] > row["planned_bytes"]]
    if beyond:
        row = max(beyond, key=lambda row: row["peak_bytes"] / row["planned_bytes"])
        found += (
            f"; {row['case']} took {gigabytes(row['peak_bytes'])} GB, {gigabytes(row['planned_bytes'])} are planned"
        )
        return Result(WARNING, "step", found, "preflight/footprint.py: what does the plan not count?", figures=figures)
    if best["mfu"] < AIM:
        remedy = "the profile below: which part takes more than its products? docs/performance.md has what to expect"
        return Result(WARNING, "step", f"{found}; {AIM:g} is the aim", remedy, figures=figures)
    return Result(OK, "step", found, figures=figures)


def in_words(section: str, rows: list[Row]) -> str:
    """Returns the most important figures of a section."""
    if section == "card":
        return ", ".join(f"{row[unit]} {unit.replace('_per_', '/')}" for row in rows for unit in row if "_per_" in unit)
    if section == "profile":
        parts = [row for row in rows if row["candidate"].startswith("part: ")]
        return ", ".join(f"{row['candidate'].removeprefix('part: ')} {row['share']:.0%}" for row in parts)
    timed = [row for row in rows if row.get("seconds")]
    missing = sorted({row["note"] for row in rows if row.get("note", "").startswith("not installed")})
    return "; ".join([f"{len(timed)} forms timed, all right within rounding", *missing])


# --- tables --------------------------------------------------------------------------------------------------


def rows_as_table(rows: list[Row]) -> list[str]:
    """Returns a Markdown table of rows, with the columns that any of them has."""
    measured = [row for row in rows if "machine" not in row]
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in measured)]
    return table([COLUMNS[name] for name in names], [[cell(name, row.get(name)) for name in names] for row in measured])


def cell(name: str, value: Any) -> str:
    if value is None or value == "":
        return ""
    if name.endswith("_bytes"):
        return gigabytes(value)
    if name in ("seconds", "teacher_wait_s"):
        return f"{1000 * value:.3g}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.1f}"
