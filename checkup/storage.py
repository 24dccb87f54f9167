"""The checks of doctor.py that look at what a run reads and writes: text, checkpoints, host memory, W&B. Of the text a
few rows are read and none is packed; nothing is written that stays, but for lock files of `datasets` in its cache.
"""

import dataclasses
import importlib.util
import netrc
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import datasets
import psutil

from arguments import TrainArguments
from checkpoint import checkpoint_bytes, find_checkpoints, step_of
from checkup.basics import FAILURE, OK, WARNING, Case, Finding, NotLookedAt
from checkup.machine import GB, default_nproc, run_device
from checkup.models import skeletons, teacher_tokenizer
from evaluation import held_out_source
from footprint import gradient_bytes, n_bytes
from held_out import naming
from mmlu_files import load_mmlu
from packing import Encoder
from resume import check_space
from rows import only_texts
from sources import cache_root, files_read_here, local_path, network_forbidden, open_source, open_stream

ROWS = 16
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


# --- text ----------------------------------------------------------------------------------------------------


def check_data(case: Case) -> Iterator[Finding]:
    yield from _look_at_text(case.args)


def check_held_out_data(case: Case) -> Iterator[Finding]:
    args = case.args
    if not args.eval_interval:
        return
    source = held_out_source(args)
    name, subset, split = args.held_out_text()
    held_out = dataclasses.replace(
        args, dataset_name=name, dataset_subset=subset, dataset_split=split, dataset_revision=source.revision
    )
    with naming(source.flags):
        yield from _look_at_text(held_out, "--eval_dataset_name")
    if args.eval_mmlu_dir is not None:
        with naming({"--mmlu_dir": "--eval_mmlu_dir"}):
            subjects = load_mmlu(args.eval_mmlu_dir)
        yield Finding(OK, f"--eval_mmlu_dir {args.eval_mmlu_dir}", f"{len(subjects)} subjects")


def _look_at_text(args: TrainArguments, flag: str = "--dataset_name") -> Iterator[Finding]:
    name = f"{flag} {args.dataset_name}"
    try:
        source = open_here(args)
    except NotLookedAt:
        subset = "" if args.dataset_subset is None else f"'{args.dataset_subset}', "
        command = f"datasets.load_dataset('{args.dataset_name}', {subset}split='{args.dataset_split}')"
        remedy = f'python -c "import datasets; {command}"   where there is a network, or give a local file or directory'
        if args.local_files_only:
            yield Finding(FAILURE, name, f"not prepared in {datasets.config.HF_DATASETS_CACHE}", remedy)
        else:
            yield Finding(WARNING, name, "not on this disk; a run would fetch it while it goes", remedy)
        return
    n_rows, texts = first_texts(source, args)
    if texts:
        found = f"split {args.dataset_split!r}: {len(texts)} of the first {n_rows} rows have text, of "
        found += f"{sum(map(len, texts)) // len(texts):,} characters on average"
        yield Finding(OK, name, found)
    else:
        found = f"none of the first {n_rows} rows has text in column {args.dataset_text_field!r}"
        yield Finding(FAILURE, name, found, "--dataset_text_field: name the column that holds the text")


def open_here(args: TrainArguments) -> datasets.Dataset | datasets.DatasetBuilder:
    """What is on this disk. NotLookedAt for a data set of the hub that is not; ValueError as a run raises it."""
    is_local = local_path(args.dataset_name) is not None
    try:
        with network_forbidden(True):
            return open_source(dataclasses.replace(args, local_files_only=True))
    except ValueError as error:
        if is_local or "is not in the cache" not in str(error):
            raise
        raise NotLookedAt("the data set is not on this disk") from error


def first_texts(source: datasets.Dataset | datasets.DatasetBuilder, args: TrainArguments) -> tuple[int, list[str]]:
    """How many of a split's first rows were read, and those that have text; of a part such as "train[99%:]", which
    only a table of all rows could tell, the first of the whole.
    """
    files_read_here(source, args)  # ValueError where it cannot go with the split
    if not args.dataset_streaming:
        whole = "+".join(dict.fromkeys(part.split("[")[0].strip() for part in args.dataset_split.split("+")))
        args = dataclasses.replace(args, dataset_split=whole)
    field = args.dataset_text_field
    with network_forbidden(True):
        rows = list(open_stream(source, args).take(ROWS))
    return len(rows), list(only_texts((row[field] for row in rows), field, args.skip_bad_rows))


def check_room_for_packed_data(case: Case) -> Iterator[Finding]:
    """Rows as `datasets` keeps them, and their tokens; what is compressed takes more."""
    args = case.args
    if args.dataset_streaming:
        return
    encoder = Encoder(teacher_tokenizer(case))
    try:
        source = open_here(args)
        _, texts = first_texts(source, args)
    except ValueError as error:  # told by `check_data`
        raise NotLookedAt("the data cannot be read") from error
    ids = encoder(texts)
    if isinstance(source, datasets.Dataset):
        files, copies = [file["filename"] for file in source.cache_files], 0
    else:
        files, copies = [str(file) for split in (source.config.data_files or {}).values() for file in split], 1
    sizes = [os.stat(file).st_size for file in files if os.path.exists(file)]
    if not sizes:  # of the hub, prepared before
        sizes, copies = [source.info.dataset_size or 0], 0
    needed = sum(sizes) * (copies + ids.nbytes / max(1, sum(len(text.encode()) for text in texts)))
    place = nearest(cache_root(args))
    if problem := _cannot_write(place):
        yield Finding(FAILURE, f"cache {cache_root(args)}", problem, "--dataset_cache_dir DIR, one of your own")
        return
    free = shutil.disk_usage(place).free
    found = f"about {needed / GB:.2g} GB to be packed, {free / GB:.1f} GB free"
    status, remedy = (OK, "") if needed < free else (WARNING, "--dataset_cache_dir DIR, on a disk with more room")
    yield Finding(status, f"cache {cache_root(args)}", found, remedy)


# --- checkpoints ---------------------------------------------------------------------------------------------


def nearest(path: Path) -> Path:
    """It, or the folder that is there and that it would be made in."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _cannot_write(place: Path) -> str | None:
    """Why not; None if it can be written. Tried: rights alone do not tell of file systems that are read-only."""
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{place} cannot be written ({error.strerror})"


def check_output_dir(case: Case) -> Iterator[Finding]:
    args, folder = case.args, Path(case.args.output_dir)
    name = f"--output_dir {folder}"
    if problem := _cannot_write(nearest(folder)):
        yield Finding(FAILURE, name, problem, "--output_dir DIR: choose a directory of your own")
        return
    steps = [step_of(checkpoint) for checkpoint in find_checkpoints(folder)]
    if steps and args.resume is None and not max(steps) <= args.resume_step:
        found = f"holds checkpoints up to checkpoint-{max(steps)}, which a run would not overwrite"
        yield Finding(FAILURE, name, found, "go on from them with --resume auto, or choose another directory")
        return
    yield Finding(OK, name, "can be written" if folder.exists() else f"can be made in {nearest(folder)}")


def check_disk(case: Case) -> Iterator[Finding]:
    args, place = case.args, nearest(Path(case.args.output_dir))
    _, student = skeletons(case)
    here = dataclasses.replace(args, output_dir=str(place if place.is_dir() else place.parent))
    check_space(here, student, (args.max_steps - args.resume_step) * args.grad_accumulation_steps)
    free, size = shutil.disk_usage(here.output_dir).free, checkpoint_bytes(student)
    yield Finding(OK, "room for two checkpoints", f"one takes {size / GB:.2g} GB, {free / GB:.1f} GB are free")


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
        held += n_bytes(teacher.parameters())
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
    if case.args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        remedy = "python -m pip install tensorboard, or leave --tensorboard out"
        yield Finding(FAILURE, "--tensorboard", "tensorboard is not installed", remedy)


def check_wandb(case: Case) -> Iterator[Finding]:
    args = case.args
    if not args.wandb:
        return
    if importlib.util.find_spec("wandb") is None:
        yield Finding(FAILURE, "--wandb", "wandb is not installed", "python -m pip install wandb, or leave --wandb out")
        return
    mode = args.wandb_mode or ("offline" if args.local_files_only else os.environ.get("WANDB_MODE") or "online")
    if mode != "online":
        later = f"; send it later: wandb sync {args.output_dir}/wandb/offline-run-*" if mode == "offline" else ""
        yield Finding(OK, "--wandb", f"{mode}, needs no login and no network{later}")
        return
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    if not _has_login(host):
        yield Finding(FAILURE, "--wandb", f"online, without a login for {host}", "wandb login, or --wandb_mode offline")
        return
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError as error:
        yield Finding(WARNING, "--wandb", f"online, but {host} cannot be reached ({error})", "--wandb_mode offline")
        return
    yield Finding(OK, "--wandb", f"online, with a login for {host}")


def _has_login(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    return file.is_file() and netrc.netrc(str(file)).authenticators(host) is not None
