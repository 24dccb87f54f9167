"""Two real ranks of one node, for tests of what ranks agree on."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.multiprocessing as mp

from processes.ranks import Ranks, process_groups


def on_two_ranks(work: Callable[[Ranks], dict], folder: Path) -> list[dict]:
    """What `work` returns on each of two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        # Forked: importing everything once more takes longer than all the rest, and no rank runs a backward.
        mp.start_processes(_rank, args=(work, port, folder), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _rank(rank: int, work: Callable[[Ranks], dict], port: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with process_groups(torch.device("cpu")) as ranks:
        torch.save(work(ranks), folder / f"{rank}.pt")
