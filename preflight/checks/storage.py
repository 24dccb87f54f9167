"""The checks of doctor.py that look at what a run writes and at room for it: log, checkpoints, host memory, charts.
Nothing is written that stays.
"""

import dataclasses
import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from checkpointing.files import checkpoint_bytes, find_checkpoints, quick_check, step_of
from checkpointing.run_folder import check_space, disk_room
from monitoring.trackers import REPLACED, check_trackers, wandb_mode
from preflight.checks.basics import FAILURE, OK, WARNING, Case, Finding
from preflight.checks.machine import GB, default_nproc, run_device
from preflight.checks.models import first_step, resumed, skeletons
from preflight.footprint import gradient_bytes, n_bytes

MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


# --- files ---------------------------------------------------------------------------------------------------


def nearest(path: Path) -> Path:
    """It, or the folder that is there and that it would be made in."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def cannot_write(place: Path) -> str | None:
    """Why not; None if it can be written. Tried: rights alone do not tell of file systems that are read-only."""
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{place} cannot be written ({error.strerror})"


def check_log_file(case: Case) -> Iterator[Finding]:
    if case.args.log_file is None:
        return
    file, problem = Path(case.args.log_file), None
    if file.exists():
        try:
            file.open("a").close()
        except OSError as error:
            problem = f"cannot be written ({error.strerror})"
    else:
        problem = cannot_write(nearest(file))
    name = f"--log_file {file}"
    yield Finding(FAILURE, name, problem, "name another") if problem else Finding(OK, name, "can be written")


def check_output_dir(case: Case) -> Iterator[Finding]:
    folder = Path(case.args.output_dir)
    name = f"--output_dir {folder}"
    if problem := cannot_write(nearest(folder)):
        yield Finding(FAILURE, name, problem, "--output_dir DIR: choose a directory of your own")
        return
    if problem := _taken(folder / ".lock"):
        yield Finding(FAILURE, name, problem, "wait for its end, or choose another directory")
        return
    if newest := _in_the_way(case):
        found = f"holds checkpoints up to {newest.name}, which a run would not overwrite"
        yield Finding(FAILURE, name, found, "go on from them with --resume auto, or choose another directory")
        return
    yield Finding(OK, name, "can be written" if folder.exists() else f"can be made in {nearest(folder)}")


def _taken(file: Path) -> str | None:
    """Whether a run holds this lock; let go of at once."""
    if not file.is_file():
        return None
    try:
        with file.open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return "another run is writing there"
    except PermissionError as error:
        return f"{file} cannot be written ({error.strerror})"
    except OSError:  # a file system without locks, of which a run only warns
        return None
    return None


def _in_the_way(case: Case) -> Path | None:
    """The newest checkpoint, if there are some that a run would overwrite: as `resume.prepare_output_dir` sees it."""
    args, (resume, problem) = case.args, resumed(case)
    if problem is not None or resume is None:  # told by `check_resume`
        return None
    found, start = find_checkpoints(Path(args.output_dir)), first_step(case)
    newer = [checkpoint for checkpoint in found if step_of(checkpoint) > start]
    if args.resume == "auto":  # those that are bad are set aside
        newer = [checkpoint for checkpoint in newer if quick_check(checkpoint) is None]
    if newer or (found and not start and resume.checkpoint is None):
        return max(newer or found, key=step_of)
    return None


def check_disk(case: Case) -> Iterator[Finding]:
    args, (_, student) = case.args, skeletons(case)
    n_left = max(0, args.max_steps * args.grad_accumulation_steps - first_step(case))
    check_space(args, student, n_left)
    room = disk_room(args, student, n_left)
    found = f"one takes {room.size / GB:.2g} GB, {room.n_here} are there, {room.n_fit - room.n_here:,} more fit"
    yield Finding(OK, "room for checkpoints", found)


def check_host_memory(case: Case) -> Iterator[Finding]:
    """For models that are on the CPU, and for the copy that a background save writes from; all ranks together."""
    args, n_ranks = case.args, default_nproc(case)
    teacher, student = skeletons(case)
    frozen = sum(p.nbytes for p in student.parameters() if not p.requires_grad)
    copy = checkpoint_bytes(student) - frozen if args.background_save else 0
    on_cpu = run_device().type == "cpu"
    held = n_ranks * (n_bytes(student.parameters()) + gradient_bytes(student)) if on_cpu else 0
    held += checkpoint_bytes(student) - n_bytes(student.parameters()) if on_cpu else 0  # masters and moments
    if args.teacher_device == "cpu" or (args.kl_weight > 0 and on_cpu) or (args.kl_weight == 0 and args.layers):
        n_teachers = n_ranks if on_cpu and args.kl_weight > 0 and args.teacher_placement == "colocated" else 1
        held += n_teachers * n_bytes(teacher.parameters())
    available = available_memory()
    found = f"{available / GB:.1f} GB available; a run takes {held / GB:.2g} GB and {copy / GB:.2g} GB while it saves"
    if held + copy < 0.9 * available:
        yield Finding(OK, "host memory", found)
    else:
        remedy = "--no_background_save" if held < 0.9 * available else "a machine with more, GPUs, or smaller models"
        yield Finding(WARNING, "host memory", found, remedy)


def available_memory() -> int:
    """Bytes; a container may have less than its machine."""
    available = psutil.virtual_memory().available
    limit = MEMORY_LIMIT.read_text().strip() if MEMORY_LIMIT.is_file() else "max"
    return min(available, int(limit)) if limit.isdecimal() else available


# --- charts --------------------------------------------------------------------------------------------------


def check_tensorboard(case: Case) -> Iterator[Finding]:
    if case.args.tensorboard:
        check_trackers(dataclasses.replace(case.args, wandb=False))
        yield Finding(OK, "--tensorboard", "its package is there")


def check_wandb(case: Case) -> Iterator[Finding]:
    """Logs in, as the run does."""
    if not case.args.wandb:
        return
    check_trackers(dataclasses.replace(case.args, tensorboard=False))
    mode = wandb_mode(case.args)
    if mode not in REPLACED:
        yield Finding(OK, "--wandb", f"{mode}, its server knows the login")
        return
    later = f"; send it later: wandb sync {case.args.output_dir}/wandb/offline-run-*" if mode == "offline" else ""
    yield Finding(OK, "--wandb", f"{mode}, needs no login and no network{later}")
