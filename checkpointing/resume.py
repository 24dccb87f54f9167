"""From which checkpoint a run goes on, and whether it is that run. Nothing here reads weights.

The quick check of a checkpoint is made before the ranks have met; its large files are hashed by all ranks together.
"""

import contextlib
import itertools
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from arguments import (
    FREE_TO_CHANGE,
    KEPT_BY_A_CACHE,
    KEPT_BY_A_RUN,
    KEPT_BY_A_STREAM,
    OUTPUT,
    PLAN,
    TrainArguments,
    group_of,
)
from checkpointing.files import (
    SMALL,
    STATE_FILE,
    checkpoint_bytes,
    find_checkpoints,
    hash_check,
    quick_check,
    read_state,
    read_sums,
    remove_partial,
    set_bad_aside,
    step_of,
)
from checkpointing.state import FORMAT
from llamba import LlambaForCausalLM
from processes.ranks import Ranks, is_main_rank
from utils import lock_dir, write_whole

logger = logging.getLogger("train")

FRESH = "; to take only its weights, start anew with --student_model {0} and another --output_dir"


def checkpoints_to_try(args: TrainArguments, world_size: int) -> list[Path]:
    """What `--resume` names, the best first; empty for a run that starts anew. All have passed the quick check and are
    of this run. Raises ValueError where nothing good is found, but something bad or foreign.
    """
    if args.resume is None:
        return []
    if args.resume != "auto":
        checkpoint = Path(args.resume).resolve()  # `latest` is a link
        if problem := _problem(checkpoint):
            raise ValueError(f"--resume {args.resume}: {problem}; expected a whole checkpoint-<micro step> of a run")
        check_same_run(checkpoint, args, world_size)
        return [checkpoint]
    found = find_checkpoints(Path(args.output_dir))
    problems = {checkpoint: _problem(checkpoint) for checkpoint in found}
    good = [checkpoint for checkpoint in found if problems[checkpoint] is None]
    if found and not good:
        raise nothing_good(args, problems)
    if not found:
        logger.info("--resume auto: no checkpoint in %s, the run starts at 0", args.output_dir)
    for checkpoint in good[:1]:
        check_same_run(checkpoint, args, world_size)
    return good


def nothing_good(args: TrainArguments, problems: dict[Path, str | None]) -> ValueError:
    listed = "; ".join(f"{checkpoint.name}: {problem}" for checkpoint, problem in problems.items())
    return ValueError(
        f"--resume {args.resume}: no good checkpoint in {args.output_dir} ({listed}); move the bad ones away to start "
        "at 0, or name a good one"
    )


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


def choose_checkpoint(args: TrainArguments, candidates: list[Path], ranks: Ranks) -> Path | None:
    """The first candidate whose large files are what was written. Those before it are set aside, so that this run can
    write its own in their place.
    """
    problems: dict[Path, str | None] = {}
    for checkpoint in candidates:
        if problems:  # the first has been looked at before
            check_same_run(checkpoint, args, ranks.world_size)
        problem = _deep_check(checkpoint, ranks)
        if problem is None:
            if ranks.is_main:
                for bad, why in problems.items():
                    set_bad_aside(bad, str(why))
            logger.info("going on from %s", checkpoint)
            return checkpoint
        problems[checkpoint] = problem
    if candidates:
        raise nothing_good(args, problems)
    return None


def _deep_check(checkpoint: Path, ranks: Ranks) -> str | None:
    """Each rank hashes its share of the files that the quick check left out."""
    sums = read_sums(checkpoint)
    large = sorted(name for name in sums if (checkpoint / name).stat().st_size >= SMALL)
    problem = hash_check(checkpoint, large[ranks.rank :: ranks.world_size])
    if problem is not None:
        logger.warning("%s is bad: %s", checkpoint, problem)
    (is_bad,) = ranks.maximum(int(problem is not None))
    return (problem or "a file is not what was written") if is_bad else None


def _problem(checkpoint: Path) -> str | None:
    if not (checkpoint / STATE_FILE).is_file():
        return f"{checkpoint} has no {STATE_FILE}" + FRESH.format(checkpoint)
    problem = quick_check(checkpoint)
    if problem is None and read_state(checkpoint).get("format") != FORMAT:
        problem = f"{STATE_FILE} is of another format" + FRESH.format(checkpoint)
    if problem is not None and is_main_rank():
        logger.warning("%s is bad: %s", checkpoint, problem)
    return problem


def check_same_run(checkpoint: Path, args: TrainArguments, world_size: int) -> None:
    """Options that make it another run than the one that wrote the checkpoint: ValueError that lists all of them. Those
    that may change are told.
    """
    state = read_state(checkpoint)
    before: dict[str, Any] = state["arguments"]
    kept = {*KEPT_BY_A_RUN, *(KEPT_BY_A_STREAM if args.dataset_streaming else KEPT_BY_A_CACHE)}
    changed = {name: value for name, value in vars(args).items() if name in before and before[name] != value}
    problems = [
        f"--{name} {value}: the run of {checkpoint} has {before[name]}; give the same"
        for name, value in changed.items()
        if name in kept
    ]
    if args.dataset_streaming and state["world_size"] != world_size:
        problems.append(
            f"--nproc_per_node: {world_size} rank(s), but the stream of {checkpoint} was shared out over "
            f"{state['world_size']}; start as many, or train from the cache (--no_dataset_streaming), which any number "
            "of ranks can go on with"
        )
    if problems:
        raise ValueError("\n  ".join([f"--resume {args.resume}: this would be another run:", *problems]))
    for name, value in changed.items():
        if name not in FREE_TO_CHANGE and group_of(name) not in (OUTPUT, PLAN) and is_main_rank():
            logger.warning("goes on with --%s %s where it had %s", name, value, before[name])


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
