"""On which GPUs the processes of a run have a CUDA context: half a gigabyte each, on a GPU that is another rank's."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from preflight.checks.basics import FAILURE, OK, WARNING
from preflight.gpu_check.facts import output_of
from preflight.gpu_check.results import Result

if TYPE_CHECKING:
    from preflight.gpu_check.children import Child

QUERY = ("nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader")
PAUSE_S = 1.0


def watch(child: Child, seconds: float) -> tuple[str | None, set[tuple[int, str]]]:
    """Waits for a run as `Child.wait` does, and also returns the CUDA contexts that its processes have had:
    local rank (-1: no rank, torchrun itself) and uuid of the GPU.
    """
    ends, ranks, seen = time.monotonic() + seconds, dict[int, int](), set[tuple[int, str]]()
    while not child.has_ended and time.monotonic() < ends:
        pids = child.pids()
        for pid in pids:
            if (rank := local_rank(pid)) is not None:
                ranks[pid] = rank
        seen |= {(ranks.get(pid, -1), uuid) for pid, uuid in parse(output_of(*QUERY)) if pid in pids}
        time.sleep(PAUSE_S)
    return child.wait(ends - time.monotonic()), seen


def parse(answer: str) -> list[tuple[int, str]]:
    """Returns (pid, uuid of the GPU) of each line of nvidia-smi's answer."""
    lines = [line.split(",") for line in answer.splitlines() if line.count(",") == 1]
    return [(int(pid), uuid.strip().removeprefix("GPU-")) for pid, uuid in lines if pid.strip().isdecimal()]


def local_rank(pid: int) -> int | None:
    """Returns the LOCAL_RANK that a process was started with, or None."""
    with contextlib.suppress(OSError):
        for variable in (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0"):
            if variable.startswith(b"LOCAL_RANK="):
                return int(variable.partition(b"=")[2])
    return None


def judge_contexts(name: str, seen: set[tuple[int, str]], allowed: dict[int, set[str]]) -> Result:
    """Returns the finding on the contexts of a run. allowed: uuids of GPUs by local rank."""
    title = f"CUDA contexts, {name}"
    if not seen:
        found = "nvidia-smi shows no process of the run, as in a container without the host's pids"
        return Result(WARNING, title, found, "nvidia-smi, on the host, while a run of two ranks is going on")
    strays = sorted((rank, uuid) for rank, uuid in seen if uuid not in allowed.get(rank, set()))
    if not strays:
        return Result(OK, title, "each rank has one on its own GPU, and nowhere else")
    found = "; ".join(f"{'rank ' + str(rank) if rank >= 0 else 'torchrun'} on GPU-{uuid}" for rank, uuid in strays)
    remedy = "which thread uses a GPU without torch.cuda.set_device first? (distillation/teacher.py: the lane's)"
    return Result(FAILURE, title, f"also where they do not belong: {found}", remedy)
