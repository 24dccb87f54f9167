"""Chooses the checkpoint that a run resumes from, checks that it is of this run, and restores from it."""

import logging
import os
from pathlib import Path
from typing import Any

from arguments import TrainArguments
from checkpointing.candidates import FRESH, followed, lone_copy, what_is_there
from checkpointing.files import (
    SMALL,
    STATE_FILE,
    find_checkpoints,
    hash_check,
    quick_check,
    read_position,
    read_state,
    read_sums,
)
from checkpointing.housekeeping import LINK, point_latest_to, set_bad_aside
from checkpointing.state import COUNTERS, FORMAT, RunState, restore_optimizer, restore_random_state, versions
from checkpointing.write_errors import only_logged
from inputs.options import free_options, kept_options
from processes.ranks import Ranks, is_main_rank
from text.separators import AUTO
from training_utils import Learner

logger = logging.getLogger("train")

# What their runs did that had no such option.
OF_EARLIER_VERSIONS = {
    "heads": [],
    "stage": "distil",
    "copied_lr_factor": 1.0,
    "warmup_steps": None,
    "grad_accumulation_dtype": "weights",
    "gradient_exchange": "allreduce",
    "gradient_bits": 16,
}


class Resume:
    """Answers where a run begins: at the best checkpoint that `--resume` names, or anew.

    Made before the ranks have met, from small files alone; `choose` has all ranks hash the large ones together.
    `checkpoint` is the best candidate until then, and afterwards the one that the run resumes from; None for a run
    that starts anew. Each candidate's training_state.json is read once.
    """

    def __init__(self, args: TrainArguments, world_size: int) -> None:
        """Raises ValueError where nothing good is found, but something bad or of another run."""
        self.args, self.world_size = args, world_size
        self._states: dict[Path, dict[str, Any]] = {}  # of what has passed the quick check
        try:
            self._candidates = self._find()
        except OSError as error:
            raise ValueError(f"--resume {args.resume}: cannot be read ({error}); make it readable") from error
        if self._candidates:
            check_same_run(self._candidates[0], self._states[self._candidates[0]], args, world_size)

    @property
    def checkpoint(self) -> Path | None:
        """Returns the best candidate, and after `choose` the one that the run resumes from."""
        return self._candidates[0] if self._candidates else None

    @property
    def start(self) -> int:
        """Returns the micro step that the run begins after."""
        return self.args.resume_step if self.resumed is None else self.resumed

    @property
    def resumed(self) -> int | None:
        """Returns the micro step of the checkpoint, whatever its folder is named; None for a run that starts anew."""
        return None if self.checkpoint is None else self._states[self.checkpoint]["micro_step"]

    def document_separator(self, eos: str | None) -> str:
        """Returns what ends a document: in a resumed run what ended it before, as --document_separator else. eos: the
        tokenizer's, which ended documents before that was an option. Raises ValueError if another is given.
        """
        given = self.args.document_separator
        if self.checkpoint is None:
            return given
        before = self._states[self.checkpoint]["arguments"].get("document_separator", eos)
        if given != AUTO and not _is_same(before, given):
            raise ValueError(_other_run(self.args, [_changed("document_separator", given, self.checkpoint, before)]))
        return before

    @property
    def parts(self) -> tuple[list[int], list[str]] | None:
        """Returns the layers and heads that a resumed run has from its teacher; None for a run that starts anew."""
        if self.checkpoint is None:
            return None
        before = {**OF_EARLIER_VERSIONS, **self._states[self.checkpoint]["arguments"]}
        return before["layers"], before["heads"]

    def choose(self, ranks: Ranks) -> None:
        """Settles on the first candidate whose large files are what was written. Those before it are set aside, so
        that this run can write its own in their place. Called by all ranks. Raises ValueError if all are bad.
        """
        problems: dict[Path, str | None] = {}
        for checkpoint in self._candidates:
            if problems:  # the first has been compared before
                check_same_run(checkpoint, self._states[checkpoint], self.args, self.world_size)
            problem = _deep_check(checkpoint, ranks)
            if problem is None:
                if ranks.is_main:
                    for bad, why in problems.items():
                        set_bad_aside(bad, str(why))
                    self._set_latest(checkpoint)
                logger.info("resuming from %s", checkpoint)
                log_versions(self._states[checkpoint])
                self._candidates = [checkpoint]
                return
            problems[checkpoint] = problem
        if problems:
            raise self._nothing_good(problems)

    def _set_latest(self, checkpoint: Path) -> None:
        """Points `latest` to the run's newest checkpoint: it may be a copy, or lead to one that was set aside."""
        if checkpoint.resolve().parent == Path(self.args.output_dir).resolve() and checkpoint.name != LINK:
            with only_logged(f"{checkpoint.parent}/{LINK} cannot be set"):
                point_latest_to(checkpoint)

    def state(self) -> RunState:
        """Returns the counters that the run begins with; position and random state have methods of their own."""
        args = self.args
        if self.checkpoint is None:
            tokens = args.resume_step * self.world_size * args.batch_size * args.seq_length
            return RunState(args.resume_step, args.resume_step // args.grad_accumulation_steps, tokens)
        return RunState(**{name: self._states[self.checkpoint][name] for name in COUNTERS})

    def position(self, rank: int) -> dict[str, Any] | None:
        """Returns this rank's position in the data, as JSON, or None for its start. A cached run's is the same for all
        ranks, however many there are.
        """
        if self.checkpoint is None:
            return None
        return read_position(self.checkpoint, rank if self.args.dataset_streaming else 0, self._n_shards)

    def restore(self, learner: Learner, ranks: Ranks) -> None:
        """Restores masters, moments and random state; the weights have been read as the student's."""
        if self.checkpoint is not None:
            restore_optimizer(self.checkpoint, self._n_shards, learner.student, learner.exchange)
            restore_random_state(self.checkpoint, self._n_shards, ranks.rank, ranks.device)

    @property
    def _n_shards(self) -> int:
        """How many ranks wrote the checkpoint."""
        assert self.checkpoint is not None
        return self._states[self.checkpoint]["world_size"]

    def _find(self) -> list[Path]:
        """Returns what `--resume` names and passes the quick check, the best first."""
        args = self.args
        if args.resume is None:
            return []
        if args.resume != "auto":
            checkpoint = followed(Path(args.resume))
            if problem := self._look_at(checkpoint):
                raise ValueError(f"--resume {args.resume}: {problem}")
            return [checkpoint]
        folder = Path(args.output_dir)
        found = find_checkpoints(folder)
        if problem := lone_copy(folder, found):
            raise ValueError(f"--resume auto: {problem}")
        problems = {checkpoint: self._look_at(checkpoint) for checkpoint in found}
        if found and not self._states:
            raise self._nothing_good(problems)
        if not found:
            logger.info("--resume auto: no checkpoint in %s, the run starts at 0", args.output_dir)
        return [checkpoint for checkpoint in found if problems[checkpoint] is None]

    def _look_at(self, checkpoint: Path) -> str | None:
        """Reads the state of a checkpoint, or returns what is wrong with it."""
        if not (checkpoint / STATE_FILE).is_file():
            return what_is_there(checkpoint)
        problem = quick_check(checkpoint)
        if problem is None:
            state = read_state(checkpoint)
            if state.get("format") == FORMAT:
                self._states[checkpoint] = state
                return None
            problem = f"{STATE_FILE} is of another format" + FRESH.format(checkpoint)
        if is_main_rank():
            logger.warning("%s is bad: %s", checkpoint, problem)
        return problem

    def _nothing_good(self, problems: dict[Path, str | None]) -> ValueError:
        listed = "; ".join(f"{checkpoint.name}: {problem}" for checkpoint, problem in problems.items())
        return ValueError(
            f"--resume {self.args.resume}: no good checkpoint in {self.args.output_dir} ({listed}); move them away "
            "to start at 0, or give --resume the path of a good one if you have it elsewhere"
        )


def _deep_check(checkpoint: Path, ranks: Ranks) -> str | None:
    """Returns what is wrong with the files that the quick check left out: each rank hashes its share of them."""
    sums = read_sums(checkpoint)
    large = sorted(name for name in sums if (checkpoint / name).stat().st_size >= SMALL)
    problem = hash_check(checkpoint, large[ranks.rank :: ranks.world_size])
    if problem is not None:
        logger.warning("%s is bad: %s", checkpoint, problem)
    (is_bad,) = ranks.maximum(int(problem is not None))
    return (problem or "a file is not what was written") if is_bad else None


def _is_same(before: Any, now: Any) -> bool:
    """Returns whether a checkpoint has this value of an option; earlier versions kept `~` in it as it was written."""
    expanded = os.path.expanduser(before) if isinstance(before, str) else before
    return now in (before, expanded)


def _changed(name: str, value: Any, checkpoint: Path, before: Any) -> str:
    given, had = (" ".join(map(str, v)) or "none" if isinstance(v, list) else v for v in (value, before))
    return f"--{name} {given}: the run of {checkpoint} has {had}; give the same"


def _other_run(args: TrainArguments, problems: list[str]) -> str:
    return "\n  ".join([f"--resume {args.resume}: this would be another run:", *problems])


def log_versions(state: dict[str, Any]) -> None:
    """Warns of packages that have another version than they had in the run that wrote this training_state.json."""
    now, before = versions(), state.get("versions", {})  # which earlier versions of this program did not write
    changed = [
        f"{name} {now[name]} (it had {before[name]})" for name in now if before.get(name, now[name]) != now[name]
    ]
    if changed and is_main_rank():
        text = "resuming with another version of %s: what follows may differ in the last bits"
        logger.warning(text, ", ".join(changed))


def check_same_run(checkpoint: Path, state: dict[str, Any], args: TrainArguments, world_size: int) -> None:
    """Raises ValueError that lists all options that make it another run than the one that wrote the checkpoint, and
    logs those that may change. state: the checkpoint's training_state.json.
    """
    before: dict[str, Any] = {**OF_EARLIER_VERSIONS, **state["arguments"]}
    kept = kept_options(args)
    auto = {"layers": args.auto_layers, "heads": args.auto_heads}
    for name, number in auto.items():
        if number is not None and len(before[name]) == number:
            before.pop(name)  # they were chosen then
        before.pop(f"auto_{name}", None)
    if args.document_separator == AUTO:  # which leaves it to the checkpoint
        before.pop("document_separator", None)
    changed = {name: now for name, now in vars(args).items() if name in before and not _is_same(before[name], now)}
    changed |= {name: f"auto:{number}" for name, number in auto.items() if name in changed and number is not None}
    problems = [_changed(name, value, checkpoint, before[name]) for name, value in changed.items() if name in kept]
    if args.dataset_streaming and state["world_size"] != world_size:
        problems.append(
            f"--nproc_per_node: {world_size} rank(s), but the stream of {checkpoint} was shared out over "
            f"{state['world_size']}; start as many, or train from the cache (--no_dataset_streaming), which any number "
            "of ranks can resume"
        )
    if problems:
        raise ValueError(_other_run(args, problems))
    for name, value in changed.items():
        if name not in free_options(TrainArguments) and is_main_rank():
            logger.warning("resuming with --%s %s where the run had %s", name, value, before[name])
