"""Traps: a function of one rank that does something else at its n-th call, such as killing all ranks. `arm` of a launch
sets them.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from checkpointing import files, saver
from distillation import adamw, objective
from monitoring import evaluator, run_log

# The moment's name -> object and attribute whose call is the moment.
MOMENTS = {
    "in the forward pass": (objective.DistillationModel, "forward"),
    "in an update": (adamw.MasterWeightAdamW, "step"),
    "in an evaluation": (evaluator, "held_out_sums"),
    "writing metrics": (run_log.MetricsFile, "write"),
    "copying to the host": (saver, "copy_to_host"),
    "before a rank's part": (saver, "write_part"),
    "writing tensors": (files, "save_file"),
    "flushing a file": (files, "flush_to_disk"),
    "hashing a file": (files, "sha256"),
    "before the publishing": (saver, "publish"),
    "at the rename": (Path, "rename"),
    "after the rename": (saver, "point_latest_to"),
    "deleting an old one": (saver, "keep_newest"),
    "restoring": (torch, "set_rng_state"),
}
OFTEN = {"in the forward pass", "in an update", "in an evaluation", "writing metrics"}
OFTEN |= {"flushing a file", "hashing a file", "at the rename"}


def trap(owner: object, name: str, n: int, act: Callable[[], None]) -> None:
    """Calls `act` at the beginning of the n-th call of `owner.name`."""
    real, calls = vars(owner)[name], 0

    def sprung(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == n:
            act()
        return real(*args, **kwargs)

    setattr(owner, name, sprung)


def kill_all() -> None:
    os.killpg(0, signal.SIGKILL)


def killing_at(moment: str, n: int, rank: int) -> Callable[[int], None]:
    """Returns an `arm` that kills all ranks when this one comes to the moment for the n-th time."""

    def arm(own_rank: int) -> None:
        if own_rank == rank:
            trap(*MOMENTS[moment], n, kill_all)

    return arm
