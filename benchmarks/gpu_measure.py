"""How bench_gpu.py measures: time by device events, memory by the allocator, candidates in interleaved rounds, and rows
that are printed for the parent process as soon as they are known.
"""

import gc
import json
import math
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from harness import RESULT, NotInstalled, Row
from torch import Tensor

ROUNDS, SHORT_ROUNDS = 7, 3
LEAST_TIME = 0.02  # seconds of one measurement; shorter work is repeated
TOLERANCE = 0.05  # relative error above which a result in bfloat16 is wrong, not rounded

Work = Callable[[], Any]
Errors = Callable[[Any], dict[str, float]]


@dataclass(frozen=True)
class PartRun:
    """Holds what a child process of bench_gpu.py has to measure, and prints its rows."""

    section: str
    case: str
    training_options: str
    device: torch.device
    quick: bool
    ends: float  # by time.monotonic(); nothing new is started after it
    short: bool = False  # fewer forms in fewer rounds

    def emit(self, case: str, candidate: str, **values: Any) -> None:
        """Prints a row. It replaces an earlier one of the same case and candidate."""
        row: Row = {"section": self.section, "case": case, "candidate": candidate}
        row |= {"seconds": None, "peak_bytes": None, "ratio_to_baseline": None, **values}
        print(RESULT + json.dumps(row), flush=True)

    def emit_error(self, case: str, candidate: str, error: Exception) -> None:
        """Prints a row with the error, or with a note where something is not installed."""
        if isinstance(error, NotInstalled):
            self.emit(case, candidate, note=f"not installed: {error}")
            return
        traceback.print_exception(error)
        first_line = (str(error).splitlines() or [""])[0]
        self.emit(case, candidate, error=f"{type(error).__name__}: {first_line}"[:200])


def timed(work: Work, device: torch.device, calls: int = 1) -> float:
    """Returns the mean seconds of `calls` calls without a pause between them."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        return (time.perf_counter() - begin) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / calls


def reset_peak(device: torch.device) -> int:
    """Resets the record of the peak. Returns the bytes that are held now."""
    gc.collect()
    if device.type != "cuda":
        return peak_memory(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes held since `reset_peak`, without waiting for the device; on a CPU the most since the
    process began, which is enough for a trial.
    """
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def compare(run: PartRun, case: str, candidates: Mapping[str, Callable[[], Work]], errors: Errors) -> None:
    """Prints rows of all candidates; the first is the baseline. Each value of `candidates` prepares the work of one.
    `errors` compares what the work returns with the truth, unless that is None.
    """
    works: dict[str, Work] = {}
    rows: dict[str, Row] = {}
    for name, make in candidates.items():
        if time.monotonic() > run.ends:
            run.emit(case, name, note="not run: out of time")
            continue
        try:
            work = make()
            rows[name] = try_out(work, run.device, errors)
        except Exception as error:
            run.emit_error(case, name, error)
            continue
        works[name] = work
        run.emit(case, name, **rows[name])  # so that it is known even if the next candidate hangs
    calls = {name: max(1, min(50, int(LEAST_TIME / max(row["seconds"], 1e-6)))) for name, row in rows.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(1 if run.quick else SHORT_ROUNDS if run.short else ROUNDS):
        for name, work in works.items():
            seconds[name].append(timed(work, run.device, calls[name]))
    baseline = next(iter(candidates))
    for name, row in rows.items():
        row["seconds"] = statistics.median(seconds[name])
        if baseline in seconds:
            row["ratio_to_baseline"] = row["seconds"] / statistics.median(seconds[baseline])
        run.emit(case, name, **row)


def try_out(work: Work, device: torch.device, errors: Errors) -> Row:
    """Returns the errors of a first run, which also compiles, the memory of a second and the seconds of a third."""
    row: Row = {}
    result = work()
    if result is not None:
        found = errors(result)
        row |= {name: error if math.isfinite(error) else None for name, error in found.items()}
        if not all(error <= TOLERANCE for error in found.values()):
            row["error"] = "wrong result: " + ", ".join(f"{name} {error:.3g}" for name, error in found.items())
    del result
    before = reset_peak(device)
    result = work()
    row["peak_bytes"] = max(0, peak_memory(device) - before - held_bytes(result))
    del result
    row["seconds"] = timed(work, device)
    return row


def held_bytes(result: Any) -> int:
    """Returns the bytes of the tensors in a result."""
    if isinstance(result, (tuple, list)):
        return sum(map(held_bytes, result))
    return result.nbytes if torch.is_tensor(result) else 0


def relative_error(out: Tensor, truth: Tensor) -> float:
    """Returns ||out - truth|| / ||truth|| in float64, by blocks, so that no second large float64 tensor is made."""
    sums = torch.zeros(2, dtype=torch.float64, device=out.device)
    rows = [tensor.detach().reshape(-1, out.shape[-1]).split(8192) for tensor in (out, truth)]
    for one, other in zip(*rows, strict=True):
        exact = other.double()
        sums += torch.stack([(one.double() - exact).square().sum(), exact.square().sum()])
    return (sums[0] / sums[1]).sqrt().item()


def matmul_rate(run: PartRun) -> float:
    """Returns the floating-point operations per second of a large product in bfloat16."""
    n = 64 if run.quick else 8192
    a, b = (torch.randn(n, n, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def work() -> None:
        torch.mm(a, b, out=out)

    timed(work, run.device, 5)
    return 2 * n**3 / statistics.median(timed(work, run.device, 10) for _ in range(5))
