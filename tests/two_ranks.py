"""Real ranks, two of one node or as many as wanted, for tests of what ranks agree on."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from processes.ranks import Ranks, process_groups
from tests import fresh


def on_two_ranks(work: Callable[[Ranks], dict], folder: Path) -> list[dict]:
    """Returns what `work` returns on each of two ranks."""
    return on_ranks(work, folder, 2)


def on_ranks(work: Callable[[Ranks], dict], folder: Path, n_ranks: int, ranks_per_node: int | None = None) -> list:
    """Returns what `work` returns on each rank. ranks_per_node: all by default."""
    codes, text = fresh.ranks([], n_ranks, functools.partial(_work, work, folder), ranks_per_node=ranks_per_node)
    assert codes == [0] * n_ranks, text
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(n_ranks)]


def _work(work: Callable[[Ranks], dict], folder: Path) -> None:
    torch.set_num_threads(1)
    with process_groups(torch.device("cpu")) as ranks:
        torch.save(work(ranks), folder / f"{ranks.rank}.pt")
