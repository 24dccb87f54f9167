"""Two real ranks of one node, for tests of what ranks agree on."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from processes.ranks import Ranks, process_groups
from tests import fresh


def on_two_ranks(work: Callable[[Ranks], dict], folder: Path) -> list[dict]:
    """Returns what `work` returns on each of two ranks."""
    codes, text = fresh.ranks([], 2, functools.partial(_work, work, folder))
    assert codes == [0, 0], text
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _work(work: Callable[[Ranks], dict], folder: Path) -> None:
    torch.set_num_threads(1)
    with process_groups(torch.device("cpu")) as ranks:
        torch.save(work(ranks), folder / f"{ranks.rank}.pt")
