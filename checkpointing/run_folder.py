"""The folder of a run, --output_dir: taking it, room on its disk, args.yaml and status.json."""

import contextlib
import itertools
import json
import logging
import os
import resource
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from arguments import TrainArguments
from checkpointing.files import checkpoint_bytes, find_checkpoints, largest_file, quick_check, step_of, try_writing
from checkpointing.housekeeping import remove_partial, set_bad_aside
from checkpointing.small_files import check_places
from llamba import LlambaForCausalLM
from processes.ranks import Ranks, restarts
from utils import TakenError, boot_id, lock_dir, write_whole

logger = logging.getLogger("train")


@contextlib.contextmanager
def taken(args: TrainArguments, resumed: int | None) -> Iterator[float]:
    """Takes --output_dir for this run, within the block. Yields how many seconds ago torchrun launched the run.
    resumed: micro step of the checkpoint that the run resumes from, if any. Raises ValueError if the folder cannot be
    written, is another run's, or holds results that this run would overwrite; status.json says "refused" for this
    ValueError and for any that is raised within the block. One of another rank does not come here: `write_refusal`.
    """
    folder = Path(args.output_dir)
    with explaining_write_errors(folder):
        check_places(folder)
        lock = prepare_output_dir(args, resumed)
        seconds_ago = begin_status(folder)
    with lock:
        try:
            yield seconds_ago
        except TakenError:  # it was removed meanwhile: its status.json is another run's
            raise
        except ValueError as error:
            write_refusal(folder, str(error))
            raise


def prepare_output_dir(args: TrainArguments, resumed: int | None) -> IO[str]:
    """Locks --output_dir, removes what unfinished saves have left, and sets newer checkpoints aside that are bad.
    resumed: micro step of the checkpoint that the run resumes from, if any. Returns the lock. Raises ValueError if the
    folder holds results that this run would overwrite.
    """
    folder = Path(args.output_dir)
    check_utf8(folder)
    lock = lock_dir("--output_dir", args.output_dir)
    lock.write(str(time.time_ns()))
    lock.flush()
    remove_partial(folder)
    start = args.resume_step if resumed is None else resumed
    if args.resume == "auto":
        for newer in find_checkpoints(folder):
            if step_of(newer) > start and (problem := quick_check(newer)):
                set_bad_aside(newer, problem)
    steps = [step_of(found) for found in find_checkpoints(folder)]
    is_new = not start and resumed is None
    if any(step > start for step in steps) or (steps and is_new):
        lock.close()
        raise ValueError(
            f"--output_dir {args.output_dir}: holds checkpoints up to checkpoint-{max(steps)}, which this run would "
            "overwrite; resume from them with --resume auto, choose another directory, or move the old one away"
        )
    return lock


def save_options(folder: Path, options: str) -> None:
    """Writes args.yaml: all options of the run, for people and for --config. An earlier args.yaml with other options is
    renamed to args.1.yaml, args.2.yaml and so on.
    """
    file = folder / "args.yaml"
    with explaining_write_errors(folder):
        if file.is_file() and file.read_text() != options:
            n = next(n for n in itertools.count(1) if not (folder / f"args.{n}.yaml").exists())
            file.rename(folder / f"args.{n}.yaml")
        write_whole(file, options.encode())


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Raises ValueError unless all nodes see the folder that the first rank has taken, and this rank can write its part
    of a checkpoint there.
    """
    lock = folder / ".lock"
    if not ranks.all_have(lock.read_bytes() if lock.is_file() else b""):
        raise ValueError(
            f"--output_dir {folder}: not the same folder on all nodes; expected one that they share, for each "
            "rank writes its part of a checkpoint"
        )
    check_writable(folder)


def check_writable(folder: Path) -> None:
    """Raises ValueError unless a checkpoint can be written into the folder. Tries it with a small one, because modes do
    not show what a file system refuses, and leaves nothing there.
    """
    try:
        try_writing(folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"--output_dir {folder}: no checkpoint can be written there ({error}); correct this, or choose another "
            "directory"
        ) from error


def check_utf8(folder: Path) -> None:
    """Raises ValueError unless the path is UTF-8: safetensors and tokenizers open no other."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(folder).decode(errors="backslashreplace")
        raise ValueError(
            f"--output_dir {shown}: the path has a byte that is not UTF-8, and no checkpoint can be written there; "
            "rename the folder, or choose another directory"
        ) from error


def check_file_limit(folder: Path, student: LlambaForCausalLM, world_size: int) -> None:
    """Raises ValueError if this process may not write files as large as those of a checkpoint by `world_size` ranks."""
    limit, needed = resource.getrlimit(resource.RLIMIT_FSIZE)[0], largest_file(student, world_size)
    if limit != resource.RLIM_INFINITY and limit < needed:
        raise ValueError(
            f"--output_dir {folder}: a checkpoint has files of {needed / 1e9:.3g} GB, but files of this process are "
            f"limited to {limit / 1e9:.3g} GB; start it after `ulimit -f unlimited`, or with more ranks"
        )


@dataclass(frozen=True)
class DiskRoom:
    """Says how much room a disk has for checkpoints of a run."""

    size: int  # bytes of one
    n_here: int  # how many are there
    n_most: int  # how many there will be at the same time, at most
    n_fit: int  # how many there can be

    @property
    def is_enough(self) -> bool:
        """Whether the run can save: it writes a new one before it deletes an old one, and a new run writes two."""
        return self.n_fit - self.n_here >= (1 if self.n_here else 2)


def disk_room(args: TrainArguments, student: LlambaForCausalLM, micro_steps: int) -> DiskRoom:
    """Returns the room for a run with that many micro steps left. --output_dir need not exist yet."""
    folder = Path(args.output_dir).absolute()
    n_here = len(find_checkpoints(folder)) if os.path.isdir(folder) else 0
    n_new = -(-micro_steps // args.save_interval) if args.save_interval else 1
    n_most = (n_here or 1) + n_new  # a run that begins saves its student as it is
    if args.save_total_limit is not None:
        n_most = min(n_most, args.save_total_limit + 1)
    while not os.path.isdir(folder):
        folder = folder.parent
    size = checkpoint_bytes(student)
    return DiskRoom(size, n_here, n_most, n_here + shutil.disk_usage(folder).free // size)


def check_space(args: TrainArguments, student: LlambaForCausalLM, micro_steps: int) -> None:
    """Raises ValueError if the disk has no room for a next checkpoint, and warns if it has not enough for all."""
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
def explaining_write_errors(folder: Path) -> Iterator[None]:
    """Turns an OSError of writing into --output_dir before training into a ValueError of one line."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"--output_dir {folder}: cannot be written ({error.strerror}); make room or choose another disk"
        ) from error


def read_status(output_dir: Path) -> dict[str, Any]:
    """Returns the content of status.json, empty where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        status = json.loads((output_dir / "status.json").read_text())
        return status if isinstance(status, dict) else {}
    return {}


def write_status(output_dir: Path, status: str, code: int, **more: Any) -> None:
    """Writes status.json: how the run stands (running, complete, stopped, diverged, refused) and its exit code."""
    content = json.dumps({"status": status, "exit_code": code, **more}, indent=2) + "\n"
    try:
        write_whole(output_dir / "status.json", content.encode())
    except OSError as error:  # the run itself is more important
        logger.warning("status.json cannot be written (%s)", error.strerror)


def write_refusal(output_dir: Path, text: str) -> None:
    """Writes status.json of a run that ends because of a mistake in its options or input. text: what is wrong."""
    write_status(output_dir, "refused", 2, text=text)


def begin_status(output_dir: Path) -> float:
    """Writes status.json with "running", which stays if the run is killed, and with the pid to signal: the other ranks
    stop with this one. Returns how many seconds ago torchrun launched the run; its restarts keep that time.
    """
    now = {"launched": time.time(), "boot": boot_id(), "launched_since_boot": time.monotonic()}
    before = read_status(output_dir) if restarts() else {}
    launched = {name: before.get(name, now[name]) for name in now}
    write_status(output_dir, "running", 0, **launched, pid=os.getpid())
    # The wall clock may jump. Only on another machine there is nothing better.
    clock = "launched_since_boot" if launched["boot"] == now["boot"] else "launched"
    return max(0.0, now[clock] - launched[clock])


def ended_before_restart(output_dir: Path) -> int | None:
    """Returns the exit code of the workers that torchrun has restarted, if they had stopped for good: under
    --max-restarts torchrun takes every code but 0 for a failure and starts the workers again.
    """
    status = read_status(output_dir) if restarts() else {}
    if status.get("status") not in ("stopped", "diverged"):
        return None
    logger.warning("not started again: %s", status["text"])
    return status["exit_code"]
