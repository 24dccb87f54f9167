"""Has saves fail: an operation of a save raises an error of the operating system on one rank, once or a few times. The
run must end equal to one that was left alone, with whole checkpoints only; or it must end before training, and do so
when it is started again without the error.
"""

import errno
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from checkpointing.files import find_checkpoints, hash_check, quick_check, read_sums
from tests.faults.compare import differences
from tests.faults.traps import MOMENTS
from tests.launch import Launch
from tests.small_runs import make_models, options

# How often each rank, or rank 0 alone, comes there in a run of five saves, at least; the trial at the start included.
OPERATIONS = {"before a rank's part": 5, "writing tensors": 12, "flushing a file": 24, "hashing a file": 17}
OF_RANK_0 = {"before the publishing": 5, "at the rename": 6, "after the rename": 5, "deleting an old one": 5}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EPERM, errno.EFBIG)
STEPS = 12  # of a run


@dataclass(frozen=True)
class Fault:
    """Says which calls of which operation (of traps.MOMENTS) raise an error, and on which rank."""

    operation: str
    rank: int
    first: int
    times: int
    code: int

    def __str__(self) -> str:
        calls = f"calls {self.first} to {self.first + self.times - 1}"
        return f"{self.operation}, rank {self.rank}, {calls}: {errno.errorcode[self.code]}"

    def arm(self, own_rank: int) -> None:
        """Sets the fault in this process if it is the rank. For `arm` of a launch."""
        owner, name = MOMENTS[self.operation]
        real, calls = vars(owner)[name], 0

        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if self.first <= calls < self.first + self.times:
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **kwargs)

        if own_rank == self.rank:
            setattr(owner, name, call)


def drawn(n: int, dice: random.Random) -> list[Fault]:
    """Returns `n` faults at random."""
    faults = []
    for _ in range(n):
        operation, code = dice.choice([*OPERATIONS, *OF_RANK_0]), dice.choice(ERRORS)
        first, times = dice.randint(1, {**OPERATIONS, **OF_RANK_0}[operation]), dice.randint(1, 3)
        faults.append(Fault(operation, dice.randrange(2) if operation in OPERATIONS else 0, first, times, code))
    return faults


def fail_saves(folder: Path, n: int, dice: random.Random) -> dict:
    """Runs `n` times with a failing save; `differences` lists what was lost."""
    models = make_models(folder)
    straight = Launch(options(models, folder / "straight", max_steps=STEPS), 2, folder / "straight.log")
    assert straight.wait() == [0, 0], straight.text()
    outcomes = try_faults(models, folder / "straight", folder, drawn(n, dice))
    lost = [f"{fault}: {what}" for fault, _, losses in outcomes for what in losses]
    return {"tried": n, "outcomes": dict(Counter(outcome for _, outcome, _ in outcomes)), "differences": lost}


def try_faults(models: Path, straight: Path, folder: Path, faults: Iterable[Fault]) -> list[tuple[str, str, list[str]]]:
    """Runs once with each fault. Returns each fault, what became of the run, and what it has lost in comparison with
    the folder of a run of STEPS micro steps that was left alone.
    """
    tried, run = [], folder / "failing"
    for number, fault in enumerate(faults):
        outcome = play(models, run, folder / f"failing-{number}.log", fault.arm)
        wrong = [outcome] if outcome.startswith("!") else what_is_lost(straight, run)
        tried.append((str(fault), outcome.partition(":")[0], wrong))
        shutil.rmtree(run)
    return tried


def play(models: Path, run: Path, log: Path, arm: Callable[[int], None]) -> str:
    """Runs with the fault, and again without if it is refused. Returns what became of it; "!..." if unforeseen."""
    argv = options(models, run, max_steps=STEPS, save_total_limit=3, resume="auto")
    launch = Launch(argv, 2, log, arm)
    codes, text = launch.wait(), launch.text()
    if codes == [0, 0]:
        return "saved later" if "could not be written" in text else "logged" if "whole all the same" in text else "none"
    if codes[0] != 2 or "error: --output_dir" not in text or find_checkpoints(run):
        return f"! exit codes {codes}: {text[-500:]}"
    again = Launch(argv, 2, log.with_suffix(".again.log")).wait()
    return "refused before training" if again == [0, 0] else f"! exit codes {again} after a refusal"


def what_is_lost(straight: Path, run: Path) -> list[str]:
    """Returns what a run has otherwise than the one that was left alone, and what it should not have left."""
    lost = differences(straight, run, STEPS)
    for checkpoint in find_checkpoints(run):
        problem = quick_check(checkpoint) or hash_check(checkpoint, read_sums(checkpoint))
        lost += [f"{checkpoint.name}: {problem}"] if problem else []
    lost += [f"{path.name} is left" for path in run.glob(".partial-*")]
    return lost
