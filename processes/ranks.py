"""Where a process stands among the ranks of a run: what torchrun's environment says of it before they meet, the process
groups in which they do, and the devices of its student and its teacher.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
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


@dataclass(frozen=True)
class Ranks:
    """Where this process stands, and the device of its student. `node` is a CPU group of the ranks of one box, whose
    teacher is run by its local rank 0; `control` is a CPU group of all ranks for small agreements.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    node: dist.ProcessGroup
    control: dist.ProcessGroup

    def maximum(self, *values: int) -> list[int]:
        """The highest of each over all ranks; what they agree by. Called by all of them at the same place."""
        highest = torch.tensor(values)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.control)
        return highest.tolist()

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks of a tensor on the CPU."""
        values = values.clone()
        dist.all_reduce(values, group=self.control)
        return values

    def all_have(self, content: bytes) -> bool:
        """Whether every rank's is the same."""
        number = int.from_bytes(hashlib.sha256(content).digest()[:7], "big")
        highest, lowest = self.maximum(number, -number)
        return highest == -lowest

    def gather(self, item: Any) -> list[Any]:
        """Every rank's item, by rank, for rank 0; nothing for the others."""
        items: list[Any] = [None] * self.world_size
        dist.gather_object(item, items if self.is_main else None, group=self.control)
        return items if self.is_main else []

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def owns_teacher(self) -> bool:
        return self.local_rank == 0

    @property
    def teacher_rank(self) -> int:
        """Global rank of the process that runs this node's teacher."""
        return self.rank - self.local_rank


def launched_rank() -> int:
    """Known before the ranks have met."""
    return int(os.environ.get("RANK", 0))


def is_main_rank() -> bool:
    """Whether this is the rank that speaks for all."""
    return launched_rank() == 0


def was_launched() -> bool:
    """Whether torchrun has started this process."""
    return "RANK" in os.environ


def launched_world_size() -> int:
    """Ranks of the run; known before they have met."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def process_groups(device: torch.device, patience: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """Joins the ranks of torchrun's environment (NCCL on GPUs, gloo on CPUs), and leaves them together at the end.
    patience: how long a rank may wait for another in an agreement, or in a `gather`.

    What uses the groups has to be gone when the block ends: a DDP model that outlives them can hang its process.
    On an error the groups are left as they are: to destroy them, NCCL would first wait for collectives that the
    other ranks are in and this one never joins. The process ends with its error, and the others hear of it.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif dist.get_debug_level() == dist.DebugLevel.DETAIL:
        logger.warning("TORCH_DISTRIBUTED_DEBUG=DETAIL taken as INFO: with it torch's DDP crashes on gloo groups")
        dist.set_debug_level(dist.DebugLevel.INFO)
    if was_launched():
        store, own_rank, n_ranks = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun keeps one store over its restarts, and in it the addresses of ranks that are gone.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=own_rank, world_size=n_ranks)
    else:  # a plain `python` run
        dist.init_process_group(backend, timeout=TIMEOUT, store=dist.HashStore(), rank=0, world_size=1)
    rank, world_size, n_local = dist.get_rank(), dist.get_world_size(), local_world_size()
    control = dist.new_group(backend="gloo", timeout=patience)
    sizes = [torch.zeros((), dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor(n_local), group=control)
    if any(size != n_local for size in sizes):
        raise ValueError(
            f"--nproc_per_node: nodes have {sorted({int(size) for size in sizes})} ranks; start the same number on each"
        )
    # Every rank takes part in making every node's group.
    nodes = [
        dist.new_group(range(i, i + n_local), timeout=TIMEOUT, backend="gloo") for i in range(0, world_size, n_local)
    ]
    lifeline = Lifeline(dist.new_group(backend="gloo", timeout=timedelta(days=3650)))
    try:
        yield Ranks(rank, world_size, local_rank(), n_local, device, nodes[rank // n_local], control)
        dist.barrier(group=control)  # nobody leaves while another still talks to it
    except BaseException as error:
        code = lifeline.report(error)
        if code is None:
            raise
        raise SystemExit(code) from error  # the first cause has been told
    lifeline.close()
    dist.destroy_process_group()
