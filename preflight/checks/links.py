"""The checks of doctor.py that time copies between GPUs, one at a time, and with --collectives what real processes send
each other.
"""

import itertools
import os
import statistics
from collections.abc import Iterator

import torch

from preflight.checks.basics import FAILURE, OK, WARNING, Finding, PlannedRun
from preflight.checks.collectives import collective_rates
from preflight.checks.machine import GB, default_nproc
from preflight.transport import settings_to_try

SLOW_COPY = 8.0  # GB/s; PCIe 4.0 with all its lanes reaches 25
LINK_BYTES, LINK_COPIES = 256 * 2**20, 5
GPU_BYTES, CPU_BYTES = 64 * 2**20, 16 * 2**20  # of a collective
PATTERN_NUMBERS = 2**22  # 16 MiB, as much as an answer of the 8B models


def check_links(run: PlannedRun) -> Iterator[Finding]:
    """Times copies between each GPU and the host, and between each two GPUs, one at a time."""
    n_gpus = torch.cuda.device_count()
    if n_gpus == 0:
        yield Finding(OK, "links", "no GPU, nothing to measure")
        return
    gpus = [torch.device("cuda", index) for index in range(n_gpus)]
    rates = {(gpu, None): copy_rate(gpu, None) for gpu in gpus} | {(None, gpu): copy_rate(None, gpu) for gpu in gpus}
    yield judge_links("links between GPUs and host", rates, send_less(run))
    pairs = list(itertools.permutations(gpus, 2))
    if pairs:
        n_direct = sum(torch.cuda.can_device_access_peer(one.index, other.index) for one, other in pairs)
        name = f"links between GPUs ({n_direct} of {len(pairs)} direct)"
        yield judge_links(name, {pair: copy_rate(*pair) for pair in pairs}, send_less(run))
        yield judge_content([pair for pair in pairs if not copy_is_right(*pair)])


def send_less(run: PlannedRun) -> str:
    """Returns which options make ranks send less to each other."""
    if run.args.stage == "align":  # gradients of mixers, and nothing of the teacher's
        return "send less: a higher --grad_accumulation_steps"
    return "send less: --teacher_signal hidden (the default), a higher --grad_accumulation_steps, --freeze_mlp"


def judge_links(name: str, rates: dict[tuple, float], remedy: str) -> Finding:
    """Returns the finding on some links. rates: (from, to) -> GB/s; None is the host. remedy: for slow ones."""
    slowest = min(rates, key=rates.__getitem__)
    way = " to ".join("host" if end is None else str(end) for end in slowest)
    found = f"{rates[slowest]:.1f} GB/s ({way}) to {max(rates.values()):.1f} GB/s"
    if rates[slowest] >= SLOW_COPY:
        return Finding(OK, name, found)
    return Finding(WARNING, name, f"{found}; below {SLOW_COPY:g} GB/s is slow", remedy)


def judge_content(wrong: list[tuple[torch.device, torch.device]]) -> Finding:
    """Returns the finding on pairs of GPUs between which a copy arrives changed."""
    name = "copies between GPUs"
    if not wrong:
        return Finding(OK, name, "arrive as they were sent")
    ways = ", ".join(f"{source} to {target}" for source, target in wrong)
    remedy = "export NCCL_P2P_DISABLE=1   (NCCL and the teacher's answers then go through the host)"
    if os.environ.get("NCCL_P2P_DISABLE") == "1":  # a run makes no such copies
        return Finding(WARNING, name, f"arrive changed ({ways}); a run makes none under NCCL_P2P_DISABLE=1", "")
    return Finding(FAILURE, name, f"arrive changed: {ways}", remedy)


def copy_is_right(source: torch.device, target: torch.device) -> bool:
    """Returns whether a copy between two GPUs has the content that was sent."""
    pattern = torch.randint(2**31 - 1, (PATTERN_NUMBERS,), dtype=torch.int32)
    return torch.equal(pattern.to(source).to(target).cpu(), pattern)


def copy_rate(source: torch.device | None, target: torch.device | None) -> float:
    """Returns the median rate of some copies in GB/s. None is pinned memory of the host."""
    given, taken = (
        torch.empty(LINK_BYTES, dtype=torch.uint8, device=place or "cpu", pin_memory=place is None)
        for place in (source, target)
    )
    seconds = []
    with torch.cuda.device(source or target):  # the copy runs on a stream of this device
        for _ in range(1 + LINK_COPIES):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            taken.copy_(given, non_blocking=True)
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1000)
    return LINK_BYTES / statistics.median(seconds[1:]) / GB


# --- collectives ---------------------------------------------------------------------------------------------


def check_collectives(run: PlannedRun) -> Iterator[Finding]:
    """Times collectives of real processes: DDP's of gradients, and others by which ranks could exchange them."""
    if not run.collectives:
        return
    on_gpus = torch.cuda.device_count() > 0
    n_ranks = max(default_nproc(run), 1 if on_gpus else 2)
    if n_ranks == 1:
        yield Finding(OK, "collectives", "one rank, nothing to measure")
        return
    n_bytes = GPU_BYTES if on_gpus else CPU_BYTES
    rates = collective_rates(n_ranks, n_bytes, on_gpus)
    name = f"collectives among {n_ranks} by {'NCCL' if on_gpus else 'gloo'}"
    yield judge_collectives(name, n_bytes, rates, send_less(run), on_gpus)


def judge_collectives(name: str, n_bytes: int, rates: dict[str, float], less: str, on_gpus: bool) -> Finding:
    """Returns the finding on collectives. rates: GB/s that a rank receives, by collective. less: how to send less."""
    figures = ", ".join(f"{collective} {rate:.3g}" for collective, rate in rates.items())
    found = f"GB/s that a rank receives, of {n_bytes / 2**20:.0f} MiB: {figures}"
    if not on_gpus:
        return Finding(OK, name, found)
    found += f". For a plan: --link_gb_per_s {rates['all_reduce']:.2g}"
    if rates["all_reduce"] >= SLOW_COPY:
        return Finding(OK, name, found)
    return Finding(WARNING, name, f"{found}. Below {SLOW_COPY:g} is slow", "; ".join([*settings_to_try(), less]))
