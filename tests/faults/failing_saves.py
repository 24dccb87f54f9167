"""Has saves fail: an operation of a save raises an error of the operating system on one rank, once or a few times. The
run must end equal to one that was left alone, with whole checkpoints only; or it must end before training, and do so
when it is started again without the error.
"""

import errno
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from checkpointing.files import find_checkpoints, hash_check, quick_check, read_sums
from tests.faults.compare import differences
from tests.faults.traps import MOMENTS
from tests.launch import Launch
from tests.small_runs import make_models, options

# How often each rank, or rank 0 alone, comes there in a run of four saves; the trial at the start included.
OPERATIONS = {"before a rank's part": 4, "writing tensors": 10, "flushing a file": 20, "hashing a file": 14}
OF_RANK_0 = {"before the publishing": 4, "at the rename": 5, "after the rename": 4, "deleting an old one": 4}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EPERM, errno.EFBIG)
STEPS = 8  # of a run


def fail_saves(folder: Path, n: int, dice: random.Random) -> dict:
    """Runs `n` times with a failing save; `differences` lists what was lost."""
    models, run = make_models(folder), folder / "failing"
    argv = options(models, folder / "straight", max_steps=STEPS)
    straight = Launch(argv, 2, folder / "straight.log")
    assert straight.wait() == [0, 0], straight.text()
    outcomes, lost = Counter[str](), []
    for number in range(n):
        operation, code = dice.choice([*OPERATIONS, *OF_RANK_0]), dice.choice(ERRORS)
        first, times = dice.randint(1, {**OPERATIONS, **OF_RANK_0}[operation]), dice.randint(1, 3)
        rank = dice.randrange(2) if operation in OPERATIONS else 0
        fault = f"{operation}, rank {rank}, calls {first} to {first + times - 1}: {errno.errorcode[code]}"
        outcome = play(models, run, folder / f"failing-{number}.log", failing(operation, first, times, code, rank))
        outcomes[outcome.partition(":")[0]] += 1
        wrong = [outcome] if outcome.startswith("!") else what_is_lost(folder / "straight", run)
        lost += [f"{fault}: {what}" for what in wrong]
        shutil.rmtree(run)
    return {"tried": n, "outcomes": dict(outcomes), "differences": lost}


def failing(operation: str, first: int, times: int, code: int, rank: int) -> Callable[[int], None]:
    """Returns an `arm` that has some calls of an operation of one rank raise OSError."""
    owner, name = MOMENTS[operation]

    def arm(own_rank: int) -> None:
        real, calls = vars(owner)[name], 0

        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if first <= calls < first + times:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        if own_rank == rank:
            setattr(owner, name, call)

    return arm


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
