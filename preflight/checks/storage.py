"""The checks of doctor.py for what a run writes and the room for it: log, checkpoints, host memory, trackers. They
leave nothing on the disk.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from checkpointing.files import checkpoint_bytes, find_checkpoints, quick_check, step_of
from checkpointing.run_folder import check_file_limit, check_space, check_utf8, check_writable, disk_room
from checkpointing.small_files import check_places
from monitoring import trackers
from preflight.alignment_footprint import not_shared
from preflight.checks.basics import FAILURE, OK, WARNING, Finding, PlannedRun, file_problem
from preflight.checks.machine import GB, default_nproc, run_device
from preflight.checks.models import first_step, resumed, skeletons
from preflight.update_footprint import gradient_bytes, n_bytes

MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, in bytes


# --- files ---------------------------------------------------------------------------------------------------


def nearest(path: Path) -> Path:
    """Returns the path itself if it is known to exist, else the nearest folder above it that is."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.exists(place))


def folder_problem(folder: Path) -> str | None:
    """Returns why no file can be made in a folder, or None. Tries it: permissions do not show that a file system is
    read-only.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror})"


def check_log_file(run: PlannedRun) -> Iterator[Finding]:
    if run.args.log_file is None:
        return
    file = Path(run.args.log_file)
    problem = file_problem(file) if os.path.exists(file) else folder_problem(nearest(file))
    name = f"--log_file {file}"
    yield Finding(FAILURE, name, problem, "name another file") if problem else Finding(OK, name, "can be written")


def check_output_dir(run: PlannedRun) -> Iterator[Finding]:
    folder = Path(run.args.output_dir)
    name = f"--output_dir {folder}"
    check_utf8(folder)
    if problem := folder_problem(nearest(folder)):
        yield Finding(FAILURE, name, problem, "--output_dir DIR: choose a directory of your own")
        return
    if problem := _lock_problem(folder / ".lock"):
        yield Finding(FAILURE, name, problem, "wait for its end, or choose another directory")
        return
    try:
        check_places(folder)
    except ValueError as error:
        yield Finding.of_error(FAILURE, name, str(error))
        return
    if newest := _in_the_way(run):
        found = f"holds checkpoints up to {newest.name}, which a run refuses to overwrite"
        yield Finding(FAILURE, name, found, "resume from them with --resume auto, or choose another directory")
        return
    check_writable(nearest(folder))
    yield Finding(OK, name, "can be written" if folder.exists() else f"can be made in {nearest(folder)}")


def _lock_problem(file: Path) -> str | None:
    """Returns why a run could not take this lock, or None. Takes it for a moment only."""
    if file.is_symlink() or (file.exists() and not file.is_file()):
        return f"{file} is no plain file but a link or the like; remove it"
    if not file.is_file():
        return None
    try:
        with file.open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "another run is writing there"
    except PermissionError as error:
        return f"{file} cannot be written ({error.strerror})"
    except OSError:  # a file system without locks: a run warns and starts
        return None
    return None


def _in_the_way(run: PlannedRun) -> Path | None:
    """Returns the newest checkpoint that a run would overwrite, or None, by the rules of
    `run_folder.prepare_output_dir`.
    """
    args, (resume, problem) = run.args, resumed(run)
    if problem is not None or resume is None:  # reported by `check_resume`
        return None
    found, start = find_checkpoints(Path(args.output_dir)), first_step(run)
    newer = [checkpoint for checkpoint in found if step_of(checkpoint) > start]
    if args.resume == "auto":  # a run sets bad ones aside
        newer = [checkpoint for checkpoint in newer if quick_check(checkpoint) is None]
    if newer or (found and not start and resume.checkpoint is None):
        return max(newer or found, key=step_of)
    return None


def check_disk(run: PlannedRun) -> Iterator[Finding]:
    args, (_, student) = run.args, skeletons(run)
    n_left = max(0, args.max_steps * args.grad_accumulation_steps - first_step(run))
    check_file_limit(Path(args.output_dir), student, default_nproc(run))
    check_space(args, student, n_left)
    room = disk_room(args, student, n_left)
    found = f"one takes {room.size / GB:.2g} GB, {room.n_here} are there, {room.n_fit - room.n_here:,} more fit"
    yield Finding(OK, "room for checkpoints", found)


def check_host_memory(run: PlannedRun) -> Iterator[Finding]:
    """Compares what all ranks take of the host's memory with what is available: models on the CPU, and the copy that a
    background save writes from.
    """
    args, n_ranks = run.args, default_nproc(run)
    teacher, student = skeletons(run)
    frozen = sum(p.nbytes for p in student.parameters() if not p.requires_grad)
    copy = checkpoint_bytes(student) - frozen if args.background_save else 0
    on_cpu = run_device().type == "cpu"
    held = n_ranks * (n_bytes(student.parameters()) + gradient_bytes(student)) if on_cpu else 0
    held += checkpoint_bytes(student) - n_bytes(student.parameters()) if on_cpu else 0  # master weights and moments
    if args.stage == "align":
        held += n_ranks * not_shared(args, teacher, student) if on_cpu else 0
    elif args.teacher_device == "cpu" or (args.kl_weight > 0 and on_cpu) or (args.kl_weight == 0 and args.takes_parts):
        n_teachers = n_ranks if on_cpu and args.kl_weight > 0 and args.teacher_placement == "colocated" else 1
        held += n_teachers * n_bytes(teacher.parameters())
    available = available_memory()
    found = f"{available / GB:.1f} GB available; a run takes {held / GB:.2g} GB and {copy / GB:.2g} GB while it saves"
    if held + copy < 0.9 * available:
        yield Finding(OK, "host memory", found)
    else:
        remedy = "--no_background_save" if held < 0.9 * available else "use GPUs, smaller models, or more memory"
        yield Finding(WARNING, "host memory", found, remedy)


def available_memory() -> int:
    """Returns the bytes that are free; a container may be limited to fewer than its machine has."""
    available = psutil.virtual_memory().available
    limit = MEMORY_LIMIT.read_text().strip() if MEMORY_LIMIT.is_file() else "max"
    return min(available, int(limit)) if limit.isdecimal() else available


# --- trackers ------------------------------------------------------------------------------------------------


def check_tensorboard(run: PlannedRun) -> Iterator[Finding]:
    if run.args.tensorboard:
        trackers.check_package("--tensorboard", "tensorboard")
        yield Finding(OK, "--tensorboard", "its package is installed")


def check_wandb(run: PlannedRun) -> Iterator[Finding]:
    """Logs in to W&B as a run does."""
    if not run.args.wandb:
        return
    trackers.check_wandb(run.args)
    mode = trackers.wandb_mode(run.args)
    if mode not in trackers.WITHOUT_SERVER:
        yield Finding(OK, "--wandb", f"{mode}, logged in")
        return
    later = f"; upload it later: wandb sync {run.args.output_dir}/wandb/offline-run-*" if mode == "offline" else ""
    yield Finding(OK, "--wandb", f"{mode}, needs no login and no network{later}")
