"""Who is who among the ranks of a run: what torchrun's environment says before they meet, and the process groups in
which they do.
"""

import hashlib
import logging
import math
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from processes.lifeline import Lifeline

logger = logging.getLogger("train")

# Reading an 8B model from a slow disk on one rank must not time out the others.
TIMEOUT = timedelta(hours=2)
LAUNCHER = "start with torchrun, which sets it, or unset RANK and WORLD_SIZE for a run of one rank"
KEEP_DETAIL = "KEEP_DISTRIBUTED_DEBUG"

# Measured on CPUs, with 1 to 4 ranks: 37 and 5 for each.
FILES, FILES_PER_RANK = 40, 6
ENOUGH_FILES = 2**16


@dataclass(frozen=True)
class Ranks:
    """Says which rank this process is, holds the device of its student, and lets ranks agree. `node` is a CPU group of
    the ranks of one machine, whose teacher is run by its local rank 0; `control` is a CPU group of all ranks.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    node: dist.ProcessGroup
    control: dist.ProcessGroup

    def maximum(self, *values: int) -> list[int]:
        """Returns the maximum of each value over all ranks, by which they agree. All ranks have to call it."""
        highest = torch.tensor(values)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.control)
        return highest.tolist()

    def total(self, values: Tensor) -> Tensor:
        """Returns the sum over all ranks of a tensor on the CPU."""
        values = values.clone()
        dist.all_reduce(values, group=self.control)
        return values

    def all_have(self, content: bytes) -> bool:
        """Returns whether all ranks have the same content."""
        number = int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
        highest, lowest = self.maximum(number, -number)
        return highest == -lowest

    def gather(self, item: Any) -> list[Any]:
        """Returns all ranks' items by rank on rank 0, and an empty list on the others."""
        items: list[Any] = [None] * self.world_size
        dist.gather_object(item, items if self.is_main else None, group=self.control)
        return items if self.is_main else []

    def share(self, item: Any) -> list[Any]:
        """Returns all ranks' items by rank, on every rank."""
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.control)
        return items

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def owns_teacher(self) -> bool:
        return self.local_rank == 0

    @property
    def teacher_rank(self) -> int:
        """The global rank of the process that runs this node's teacher."""
        return self.rank - self.local_rank


def launched_rank() -> int:
    """Returns this process's rank, before the ranks have met."""
    return _number("RANK", 0)


def is_main_rank() -> bool:
    """Returns whether this is rank 0, which logs and writes for all."""
    return launched_rank() == 0


def was_launched() -> bool:
    """Returns whether torchrun has started this process."""
    return "RANK" in os.environ


def launched_world_size() -> int:
    """Returns the number of ranks of the run, before they have met."""
    return _number("WORLD_SIZE", 1)


def local_rank() -> int:
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    return _number("LOCAL_WORLD_SIZE", 1)


def restarts() -> int:
    """Returns how often torchrun has started the ranks again (--max-restarts)."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def _number(name: str, default: int) -> int:
    """Returns an environment variable that torchrun sets. Raises ValueError if it is not a whole number."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or len(value) > 9:
        raise ValueError(f"{name}={value}: expected a whole number; {LAUNCHER}")
    return int(value)


def check_launch() -> None:
    """Raises ValueError if the variables by which torchrun says who is who are incomplete or contradict each other:
    with them ranks would wait for each other without end, or train apart from each other. So it does where a process
    may open too few files for its ranks.
    """
    rank, world_size, n_local = launched_rank(), launched_world_size(), local_world_size()
    restarts()
    needed = ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] if was_launched() else []
    if world_size > 1:
        needed = ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *needed]
    if missing := [name for name in needed if not os.environ.get(name)]:
        given = f"RANK={rank}" if was_launched() else f"WORLD_SIZE={world_size}"
        raise ValueError(f"{', '.join(missing)}: not set, but {given} is; {LAUNCHER}")
    limits = [
        ("WORLD_SIZE", world_size, 1, 10**9),
        ("RANK", rank, 0, world_size - 1),
        ("LOCAL_WORLD_SIZE", n_local, 1, world_size),
        ("LOCAL_RANK", local_rank(), 0, n_local - 1),
    ]
    if was_launched():
        limits.append(("MASTER_PORT", _number("MASTER_PORT", 0), 1, 2**16 - 1))
    for name, value, least, most in limits:
        if not least <= value <= most:
            raise ValueError(f"{name}={value}: expected {least} to {most}; {LAUNCHER}")
    if world_size % n_local:
        raise ValueError(
            f"LOCAL_WORLD_SIZE={n_local}: expected a divisor of WORLD_SIZE={world_size}; start the same number of "
            "ranks on each node"
        )
    allow_open_files(world_size)


def allow_open_files(world_size: int) -> None:
    """Raises the limit of open files as far as a rank may need. Raises ValueError if that is too little."""
    needed = FILES + FILES_PER_RANK * world_size
    soft, hard = (math.inf if limit < 0 else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    if hard < needed:
        raise ValueError(
            f"ulimit -n {hard}: a rank of {world_size} opens up to {needed} files and connections; raise the limit "
            f"(ulimit -Hn {max(1024, needed)}, or ask the administrator)"
        )
    enough = int(min(hard, ENOUGH_FILES))  # CUDA, NCCL and loader processes open more than was counted
    if soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


@contextmanager
def process_groups(
    device: torch.device, patience: timedelta = TIMEOUT, on_mistake: Callable[[str], None] | None = None
) -> Iterator[Ranks]:
    """Joins the ranks of torchrun's environment (NCCL on GPUs, gloo on CPUs) within the block.
    patience: how long a rank may wait for another in an agreement, or in a `gather`. on_mistake: called on rank 0 with
    the text of a ValueError of another rank, before this ends the process.

    No DDP model may outlive the block: it can hang its process. On an error the groups are not destroyed, because NCCL
    would first wait for collectives that this rank never joins; the process ends with its error, and the lifeline
    reports it to the others.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _lower_debug_level()
    if was_launched():
        store, own_rank, n_ranks = _meet()
        # torchrun keeps one store over its restarts, with the addresses of ranks that no longer exist.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=own_rank, world_size=n_ranks)
    else:  # a plain `python` run
        dist.init_process_group(backend, timeout=TIMEOUT, store=dist.HashStore(), rank=0, world_size=1)
    rank, world_size, n_local = dist.get_rank(), dist.get_world_size(), local_world_size()
    control = dist.new_group(backend="gloo", timeout=patience)
    _check_nodes(n_local, control)
    # Every rank takes part in making every node's group.
    nodes = [
        dist.new_group(range(i, i + n_local), timeout=TIMEOUT, backend="gloo") for i in range(0, world_size, n_local)
    ]
    lifeline = Lifeline(dist.new_group(backend="gloo", timeout=timedelta(days=3650)), on_mistake)
    try:
        yield Ranks(rank, world_size, local_rank(), n_local, device, nodes[rank // n_local], control)
        dist.barrier(group=control)  # no rank leaves while another still needs it
    except BaseException as error:
        code = lifeline.report(error)
        if code is None:
            raise
        raise SystemExit(code) from error  # the first cause has been reported
    lifeline.close()
    dist.destroy_process_group()


def _lower_debug_level() -> None:
    """Takes TORCH_DISTRIBUTED_DEBUG=DETAIL as INFO. Under it torch wraps every group: before each collective all ranks
    first compare what they are about to do, and a small one takes ten times as long. An optimizer step of the 8B models
    has some 300 of them.
    """
    if dist.get_debug_level() == dist.DebugLevel.DETAIL and os.environ.get(KEEP_DETAIL) != "1":
        dist.set_debug_level(dist.DebugLevel.INFO)
        logger.warning(
            "TORCH_DISTRIBUTED_DEBUG=DETAIL taken as INFO: under it all ranks compare their arguments before every "
            f"collective, and torch's DDP crashes on a CPU; {KEEP_DETAIL}=1 keeps it"
        )


def _meet() -> tuple[dist.Store, int, int]:
    """Returns the store that all ranks have, this rank, and their number. Raises ValueError if it is not to be had."""
    try:
        return next(dist.rendezvous("env://", timeout=TIMEOUT))
    except dist.DistError as error:
        place = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise ValueError(f"{place}: the ranks cannot meet there ({reason}); expected a free port of node 0") from error


def _check_nodes(n_local: int, control: dist.ProcessGroup) -> None:
    """Raises ValueError on all ranks unless each node has `n_local`, numbered node by node."""
    seats = [torch.zeros(2, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(seats, torch.tensor([n_local, local_rank()]), group=control)
    sizes = sorted({int(size) for size, _ in seats})
    if len(sizes) > 1:
        raise ValueError(f"--nproc_per_node: nodes have {sizes} ranks; start the same number on each")
    for rank, (_, own) in enumerate(seats):
        if own != rank % n_local:
            raise ValueError(
                f"RANK={rank} LOCAL_RANK={int(own)} LOCAL_WORLD_SIZE={n_local}: expected ranks that are numbered node "
                "by node; start with torchrun, which does so"
            )
