"""What the benchmarks share: their options, candidates in fresh child processes and interleaved rounds, and a table of
the medians.

A benchmark is a script with a function `run(case, candidate) -> dict` that calls `measure` on its work. `run_rounds`
calls it once in every round with each of two allocators. glibc's default one returns large buffers to the kernel, so
that every new one is paged in again; a caching one keeps them, as CUDA's does. Project modules are imported inside
`run`: the script itself imports only files beside it.
"""

import argparse
import ctypes
import gc
import importlib
import importlib.util
import json
import operator
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# All memory comes from one heap that grows in steps of 256 MiB and never shrinks. The caches for small pieces are off:
# with them, fragments between two large blocks keep these from being joined and reused.
CACHING = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776"
    ":glibc.malloc.top_pad=268435456:glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
}
RESULT = "result of the child: "

Row = dict[str, Any]


class NotInstalled(Exception):
    """A candidate needs something that is not installed here. Its row says so in place of figures."""


def need(package: str) -> None:
    """Raises NotInstalled without this package; a candidate calls it before it imports another library."""
    if importlib.util.find_spec(package) is None:
        raise NotInstalled(package)


def need_compiler(device_type: str) -> None:
    """Raises NotInstalled where torch.compile lacks what it needs for "cpu" or "cuda"."""
    from processes.devices import can_compile

    if not can_compile(device_type):
        raise NotInstalled("a C++ compiler" if device_type == "cpu" else "Triton and a C compiler")


@dataclass(frozen=True)
class Options:
    """Holds what a benchmark was asked to do. `rounds` is 1 with --quick."""

    json: Path | None
    quick: bool
    cases: list[str]
    candidates: list[str]
    rounds: int


def parse_options(
    description: str | None,
    cases: Collection[str],
    candidates: Collection[str],
    baselines: Collection[str],
    quick_cases: Collection[str] = (),
    quick_candidates: Collection[str] = (),
) -> Options:
    """Parses the options that every benchmark has. With --quick the cases are `quick_cases`, or, if there are none, the
    first of those chosen; the candidates are `quick_candidates`, if there are any, unless others are named. `baselines`
    are always among the candidates. Exits with one line where a value of --cases or --candidates matches nothing.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, one round: a trial, no result")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="only cases whose names contain one of these")
    parser.add_argument("--candidates", nargs="+", metavar="NAME", help="only these candidates, and the baseline")
    parser.add_argument("--rounds", type=int, default=3, help="how often each candidate is measured (default: 3)")
    args = parser.parse_args()

    all_cases = quick_cases if args.quick and quick_cases else cases
    chosen_cases = _choose("--cases", args.cases, all_cases, operator.contains, "a part of one of these names")
    if args.quick and not quick_cases:
        chosen_cases = chosen_cases[:1]
    if args.quick and quick_candidates and not args.candidates:
        args.candidates = list(quick_candidates)
    named = _choose("--candidates", args.candidates, candidates, operator.eq, "one of these names")
    chosen = [name for name in candidates if name in named or name in baselines]
    return Options(args.json, args.quick, chosen_cases, chosen, 1 if args.quick else args.rounds)


def _choose(
    flag: str, values: list[str] | None, names: Collection[str], matches: Callable[[str, str], bool], expected: str
) -> list[str]:
    """Returns the names that match one of the values, all of them without values."""
    for value in values or ():
        if not any(matches(name, value) for name in names):
            sys.exit(f"{flag} {value!r}: expected {expected}: {', '.join(map(repr, names))}")
    return [name for name in names if values is None or any(matches(name, value) for value in values)]


def describe_machine() -> str:
    """Returns one line with the processor, its cores, the GPUs, the versions and the date."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":")[1].strip()
            break
    parts = [cpu, f"{len(os.sched_getaffinity(0))} cores", f"{torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    versions = [
        f"Python {platform.python_version()}",
        *(f"{name} {version(name)}" for name in ("torch", "transformers")),
    ]
    return ", ".join([*parts, *versions, time.strftime("%Y-%m-%d")])


def measure(work: Callable[[], dict | None], repeats: int = 1) -> Row:
    """Runs `work` to warm up, then `repeats` times. Returns the median seconds, the peak of memory in bytes above what
    was held before, and what the last run of `work` returned.
    """
    on_cuda = torch.cuda.is_available()
    # The caching allocator's heap still grows a little after the first run, until its holes fit what is asked for.
    for _ in range(3 if _is_caching() else 1):
        result = work()
    gc.collect()
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = _reset_peak_memory()
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        if on_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if on_cuda else process_bytes("VmHWM")
    return {"seconds": statistics.median(seconds), "peak_bytes": peak - before, **(result or {})}


def _reset_peak_memory() -> int:
    """Resets the kernel's record of this process's peak. Returns the bytes that the process holds now. Without trimming
    first, freed memory that glibc keeps would count as held; the caching allocator must keep it, since only its time
    is of interest.
    """
    if not _is_caching():
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return process_bytes("VmRSS")


def _is_caching() -> bool:
    return os.environ.get("GLIBC_TUNABLES") == CACHING["GLIBC_TUNABLES"]


def process_bytes(field: str) -> int:
    """Returns a field of /proc/self/status in bytes: "VmRSS" is what the process holds, "VmHWM" the most it held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def run_child(script: str, function: str, *args: Any, environment: dict[str, str] | None = None) -> Row:
    """Calls `function(*args)` of a script in a fresh process and returns its dict; {"note": ...} where it raised
    NotInstalled. Raises RuntimeError, with the end of its output, where it failed otherwise.
    """
    path = [str(ROOT), str(Path(__file__).parent), str(Path(script).parent), os.environ.get("PYTHONPATH", "")]
    child = subprocess.run(
        [sys.executable, "-c", "import harness; harness.serve()", Path(script).stem, function, json.dumps(args)],
        env={**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
    )
    answers = [line for line in child.stdout.splitlines() if line.startswith(RESULT)]
    if child.returncode or not answers:
        what = f"{Path(script).name}: {function}{args} failed with exit code {child.returncode}"
        raise RuntimeError(f"{what}\n{child.stdout[-1000:]}\n{child.stderr[-4000:]}")
    return json.loads(answers[-1].removeprefix(RESULT))


def serve() -> None:
    """Calls the function that `run_child` named on the command line, and prints its dict."""
    module, function, args = sys.argv[1:]
    try:
        result = vars(importlib.import_module(module))[function](*json.loads(args))
    except NotInstalled as missing:
        result = {"note": f"not installed: {missing}"}
    print(RESULT + json.dumps(result), flush=True)


def run_rounds(script: str, cases: dict[str, list[str]], rounds: int, baseline: str, *extra: Any) -> list[Row]:
    """Measures the candidates of each case. `extra` is passed to `run` after case and candidate. In every round each
    candidate runs once per allocator (on CUDA there is only one), so that a disturbance of the machine affects all
    alike. A row holds medians: `seconds` with the caching allocator, `default_seconds` and `peak_bytes` with the
    default one, ratios to the baseline's, and whatever else the last `run` returned.
    """
    allocators: dict[str, dict[str, str]] = {"caching": CACHING, "default": {}}
    if torch.cuda.is_available():
        allocators = {"caching": {}}
    rows = []
    for case, candidates in cases.items():
        runs: dict[tuple[str, str], list[Row]] = {(name, a): [] for name in candidates for a in allocators}
        for round_ in range(rounds):
            for (candidate, allocator), results in runs.items():
                if results and "note" in results[0]:
                    continue
                results.append(run_child(script, "run", case, candidate, *extra, environment=allocators[allocator]))
                print(f"{case}: round {round_}, {candidate}, {allocator}: {results[-1]}", file=sys.stderr, flush=True)
        case_rows = [_row(case, name, runs[name, "caching"], runs.get((name, "default"), [])) for name in candidates]
        _add_ratios(case_rows, baseline)
        rows += case_rows
    return rows


def _row(case: str, candidate: str, caching: list[Row], default: list[Row]) -> Row:
    def median(results: list[Row], key: str) -> float | None:
        values = [result[key] for result in results if key in result]
        return statistics.median(values) if values else None

    row = {"case": case, "candidate": candidate, "seconds": median(caching, "seconds")}
    row["peak_bytes"] = median(default or caching, "peak_bytes")
    row["ratio_to_baseline"] = None
    if default:
        row["default_seconds"] = median(default, "seconds")
    return {**caching[-1], **row}


def _add_ratios(rows: list[Row], baseline: str) -> None:
    base = next((row for row in rows if row["candidate"] == baseline), None)
    ratios = {"seconds": "ratio_to_baseline", "default_seconds": "default_ratio", "peak_bytes": "peak_ratio"}
    for row in rows:
        for key, ratio in ratios.items():
            if base is not None and row.get(key) is not None and base.get(key):
                row[ratio] = row[key] / base[key]


def write_json(rows: list[Row], file: Path) -> None:
    """Writes the rows to a file, and makes its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=1) + "\n")


def print_table(rows: list[Row]) -> None:
    """Prints the rows as a Markdown table with every key that any of them has; bytes as MB."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns.sort(key=lambda name: name not in ("case", "candidate"))
    print("| " + " | ".join(name.replace("_bytes", "_MB") for name in columns) + " |")
    print("|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(_cell(name, row.get(name)) for name in columns) + " |")


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return f"{value / 1e6:.0f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def report(rows: list[Row], file: Path | None) -> None:
    """Prints the machine and the table, and writes the rows to a file if there is one."""
    print(describe_machine())
    print_table(rows)
    if file is not None:
        write_json(rows, file)
