"""From which checkpoint a run goes on, and whether it is that run. Nothing here reads weights.

The quick check of a checkpoint is made before the ranks have met; its large files are hashed by all ranks together.
"""

import logging
from pathlib import Path
from typing import Any

from arguments import TrainArguments, free_options, kept_options
from checkpointing.files import (
    SMALL,
    STATE_FILE,
    find_checkpoints,
    hash_check,
    quick_check,
    read_state,
    read_sums,
    set_bad_aside,
)
from checkpointing.state import FORMAT
from processes.ranks import Ranks, is_main_rank

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
    kept = kept_options(args)
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
        if name not in free_options() and is_main_rank():
            logger.warning("goes on with --%s %s where it had %s", name, value, before[name])
