"""The folder of a run, --output_dir: who writes there, room on its disk, args.yaml and status.json."""

import contextlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from arguments import TrainArguments
from checkpointing.files import checkpoint_bytes, find_checkpoints, quick_check, remove_partial, set_bad_aside, step_of
from llamba import LlambaForCausalLM
from processes.ranks import Ranks
from utils import lock_dir, write_whole

logger = logging.getLogger("train")


def prepare_output_dir(args: TrainArguments, candidates: list[Path]) -> IO[str]:
    """Takes --output_dir for this run: away with what saves that came to no end have left, and with newer checkpoints
    that are bad; ValueError if it holds results that this run would overwrite. Returns the lock on it.
    """
    folder = Path(args.output_dir)
    lock = lock_dir("--output_dir", args.output_dir)
    lock.write(str(time.time_ns()))
    lock.flush()
    remove_partial(folder)
    start = step_of(candidates[0]) if candidates else args.resume_step
    if args.resume == "auto":
        for checkpoint in find_checkpoints(folder):
            if step_of(checkpoint) > start and (problem := quick_check(checkpoint)):
                set_bad_aside(checkpoint, problem)
    steps = [step_of(checkpoint) for checkpoint in find_checkpoints(folder)]
    if any(step > start for step in steps) or (steps and not start and not candidates):
        lock.close()
        raise ValueError(
            f"--output_dir {args.output_dir}: holds checkpoints up to checkpoint-{max(steps)}, which this run would "
            "overwrite; go on from them with --resume auto, choose another directory, or move the old one away"
        )
    return lock


def keep_options(folder: Path, options: str) -> None:
    """args.yaml: all options of the run, for people and for --config. Where it says something else, as in a run that
    goes on with other options, it moves to args.1.yaml, args.2.yaml and so on.
    """
    file = folder / "args.yaml"
    if file.is_file() and file.read_text() != options:
        n = next(n for n in itertools.count(1) if not (folder / f"args.{n}.yaml").exists())
        file.rename(folder / f"args.{n}.yaml")
    write_whole(file, options.encode())


def check_shared(args: TrainArguments, ranks: Ranks) -> None:
    """Every rank writes its part of a checkpoint: all nodes have to see the folder that the first rank has taken."""
    lock = Path(args.output_dir) / ".lock"
    token = int(lock.read_text()) if lock.is_file() else 0
    highest, lowest = ranks.maximum(token, -token)
    if highest != -lowest:
        raise ValueError(
            f"--output_dir {args.output_dir}: not the same folder on all nodes; expected one that they share, for each "
            "rank writes its part of a checkpoint"
        )


@dataclass(frozen=True)
class DiskRoom:
    """For checkpoints of a run. size: bytes of one; n_here: how many are there; n_most: how many there will be at a
    time, at most; n_fit: how many there can be.
    """

    size: int
    n_here: int
    n_most: int
    n_fit: int

    @property
    def is_enough(self) -> bool:
        """To go on: a new one is written before an old one is deleted, and the first of a run is never the last."""
        return self.n_fit - self.n_here >= (1 if self.n_here else 2)


def disk_room(args: TrainArguments, student: LlambaForCausalLM, micro_steps: int) -> DiskRoom:
    """For a run that has that many micro steps to go. --output_dir need not be there yet."""
    folder = Path(args.output_dir).absolute()
    n_here = len(find_checkpoints(folder)) if folder.is_dir() else 0
    n_new = -(-micro_steps // args.save_interval) if args.save_interval else 1
    n_most = (n_here or 1) + n_new  # a run that begins saves its student as it is
    if args.save_total_limit is not None:
        n_most = min(n_most, args.save_total_limit + 1)
    while not folder.is_dir():
        folder = folder.parent
    size = checkpoint_bytes(student)
    return DiskRoom(size, n_here, n_most, n_here + shutil.disk_usage(folder).free // size)


def check_space(args: TrainArguments, student: LlambaForCausalLM, micro_steps: int) -> None:
    """Whether the disk has room for this run's checkpoints: ValueError if it cannot go on, a warning if not for all."""
    room = disk_room(args, student, micro_steps)
    facts = (
        f"--output_dir {args.output_dir}: a checkpoint takes {room.size / 1e9:.1f} GB, {room.n_here} are there and the "
        f"disk has room for {room.n_fit - room.n_here} more"
    )
    if not room.is_enough:
        least = "one more" if room.n_here else "two"
        raise ValueError(f"{facts}, expected room for {least} at least; make room or choose another disk")
    if room.n_fit < room.n_most:
        logger.warning(
            "%s, but the run keeps up to %d: raise --save_interval or give --save_total_limit", facts, room.n_most
        )


@contextlib.contextmanager
def writing_to(args: TrainArguments) -> Iterator[None]:
    """What cannot be written into --output_dir before training is one line: ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"--output_dir {args.output_dir}: cannot be written ({error.strerror}); make room or choose another disk"
        ) from error


def read_status(output_dir: Path) -> dict[str, Any]:
    """status.json; nothing where there is none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        status = json.loads((output_dir / "status.json").read_text())
        return status if isinstance(status, dict) else {}
    return {}


def write_status(output_dir: Path, status: str, code: int, **more: Any) -> None:
    """status.json: how the run stands (running, complete, stopped, diverged) and the exit code that says so."""
    partial = output_dir / ".status.json.partial"
    try:
        partial.write_text(json.dumps({"status": status, "exit_code": code, **more}, indent=2) + "\n")
        partial.replace(output_dir / "status.json")
    except OSError as error:  # the run itself is more important
        logger.warning("status.json cannot be written (%s)", error.strerror)


def begin_status(output_dir: Path) -> float:
    """status.json says "running" from here on, to the run's death if that is how it ends. Returns when torchrun
    launched the run, in seconds since the epoch: its restarts keep that time.
    """
    launched = time.time()
    if _restarts():
        launched = read_status(output_dir).get("launched", launched)
    write_status(output_dir, "running", 0, launched=launched)
    return launched


@contextlib.contextmanager
def telling_refusal(output_dir: Path) -> Iterator[None]:
    """A run that its input ends, with a ValueError, was refused: status.json must not say that it is running."""
    try:
        yield
    except ValueError as error:
        write_status(output_dir, "refused", 2, text=str(error))
        raise


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def ended_before_restart(output_dir: Path) -> int | None:
    """The exit code of the workers that torchrun has restarted, if they had stopped for good: under --max-restarts
    torchrun takes every code but 0 for a failure and starts the workers again.
    """
    status = read_status(output_dir) if _restarts() else {}
    if status.get("status") not in ("stopped", "diverged"):
        return None
    logger.warning("not started again: %s", status["text"])
    return status["exit_code"]
