"""The checks of doctor.py for text: whether it is on this disk, can be read and is enough, and whether there is room
for it once packed. They read a few rows and pack none, and leave nothing on the disk but lock files of `datasets` in
its cache.
"""

import dataclasses
import math
import os
import shutil
from collections.abc import Iterator

import datasets

from arguments import TrainArguments
from evaluation.held_out import naming
from evaluation.mmlu_files import load_mmlu
from monitoring.evaluator import held_out_source
from preflight.checks.basics import FAILURE, OK, WARNING, CheckSkipped, Finding, PlannedRun
from preflight.checks.machine import GB, default_nproc
from preflight.checks.models import teacher_tokenizer
from preflight.checks.storage import folder_problem, nearest
from text.batch import MAKE_IT_FIT
from text.encoding import Encoder
from text.rows import only_texts
from text.sources import cache_root, files_read_here, local_path, network_forbidden, open_source, open_stream

ROWS = 16  # that are read of a split


def check_data(run: PlannedRun) -> Iterator[Finding]:
    args, step_windows = run.args, run.args.batch_size * default_nproc(run)  # of a micro step
    needed = step_windows
    if not args.dataset_streaming:  # a run on packed data needs enough for one optimizer step
        needed = max(needed, math.ceil(args.grad_accumulation_steps * step_windows / args.epochs))
    yield from _check_text(run, args, "--dataset_name", needed)


def check_held_out_data(run: PlannedRun) -> Iterator[Finding]:
    args = run.args
    if not args.eval_interval:
        return
    source = held_out_source(args)
    name, subset, split = args.held_out_text()
    held_out = dataclasses.replace(
        args, dataset_name=name, dataset_subset=subset, dataset_split=split, dataset_revision=source.revision
    )
    with naming(source.flags):
        yield from _check_text(run, held_out, "--eval_dataset_name", 1)
    if args.eval_mmlu_dir is not None:
        with naming({"--mmlu_dir": "--eval_mmlu_dir"}):
            subjects = load_mmlu(args.eval_mmlu_dir)
        yield Finding(OK, f"--eval_mmlu_dir {args.eval_mmlu_dir}", f"{len(subjects)} subjects")


def _check_text(run: PlannedRun, args: TrainArguments, flag: str, needed: int) -> Iterator[Finding]:
    """Yields the findings on one data set. needed: windows that its text has to fill."""
    name = f"{flag} {args.dataset_name}"
    try:
        source = open_here(args)
    except CheckSkipped:
        subset = "" if args.dataset_subset is None else f"'{args.dataset_subset}', "
        command = f"datasets.load_dataset('{args.dataset_name}', {subset}split='{args.dataset_split}')"
        remedy = f'python -c "import datasets; {command}"   where there is a network, or give a local file or directory'
        if args.local_files_only:
            yield Finding(FAILURE, name, f"not prepared in {datasets.config.HF_DATASETS_CACHE}", remedy)
        else:
            yield Finding(WARNING, name, "not on this disk; a run would download it", remedy)
        return
    n_rows, texts = first_texts(source, args)
    if texts:
        found = f"split {args.dataset_split!r}: {len(texts)} of the first {n_rows} rows have text, of "
        found += f"{sum(map(len, texts)) // len(texts):,} characters on average"
        yield Finding(OK, name, found)
    else:
        found = f"none of the first {n_rows} rows has text in column {args.dataset_text_field!r}"
        yield Finding(FAILURE, name, found, "--dataset_text_field: name the column that holds the text")
    if texts and n_rows < ROWS:  # the split has no more
        n_tokens, fewest = len(Encoder(teacher_tokenizer(run))(texts)), needed * (args.seq_length + 1)
        if n_tokens < fewest:
            found = f"{n_tokens:,} tokens in all, expected {fewest:,}: {needed} window(s) of {args.seq_length + 1}"
            yield Finding(FAILURE, name, found, MAKE_IT_FIT)


def open_here(args: TrainArguments) -> datasets.Dataset | datasets.DatasetBuilder:
    """Opens data on this disk. Raises CheckSkipped for a data set of the hub that is not on it, and ValueError where a
    run does.
    """
    is_local = local_path(args.dataset_name) is not None
    try:
        with network_forbidden(True):
            return open_source(dataclasses.replace(args, local_files_only=True))
    except ValueError as error:
        if is_local or "is not in the cache" not in str(error):
            raise
        raise CheckSkipped("the data set is not on this disk") from error


def first_texts(source: datasets.Dataset | datasets.DatasetBuilder, args: TrainArguments) -> tuple[int, list[str]]:
    """Returns how many rows of a split were read, its first ones, and the texts in them. Of a part such as
    "train[99%:]" the first rows of the whole split are read: finding the part takes a table of all rows.
    """
    files_read_here(source, args)  # raises ValueError if --skip_bad_rows cannot be used with the split
    if not args.dataset_streaming:
        whole = "+".join(dict.fromkeys(part.split("[")[0].strip() for part in args.dataset_split.split("+")))
        args = dataclasses.replace(args, dataset_split=whole)
    field = args.dataset_text_field
    with network_forbidden(True):
        rows = list(open_stream(source, args).take(ROWS))
    return len(rows), list(only_texts((row[field] for row in rows), field, args.skip_bad_rows))


def check_room_for_packed_data(run: PlannedRun) -> Iterator[Finding]:
    """Estimates the rows as `datasets` keeps them, and their tokens. Compressed files take more than estimated."""
    args = run.args
    if args.dataset_streaming:
        return
    encoder = Encoder(teacher_tokenizer(run))
    try:
        source = open_here(args)
        _, texts = first_texts(source, args)
    except ValueError as error:  # reported by `check_data`
        raise CheckSkipped("the data cannot be read") from error
    ids = encoder(texts)
    if isinstance(source, datasets.Dataset):
        files, copies = [file["filename"] for file in source.cache_files], 0
    else:
        files, copies = [str(file) for split in (source.config.data_files or {}).values() for file in split], 1
    sizes = [os.stat(file).st_size for file in files if os.path.exists(file)]
    if not sizes:  # a data set of the hub that was prepared before
        sizes, copies = [source.info.dataset_size or 0], 0
    needed = sum(sizes) * (copies + ids.nbytes / max(1, sum(len(text.encode()) for text in texts)))
    place = nearest(cache_root(args))
    if problem := folder_problem(place):
        yield Finding(FAILURE, f"cache {cache_root(args)}", problem, "--dataset_cache_dir DIR: choose one of your own")
        return
    free = shutil.disk_usage(place).free
    found = f"packing takes about {needed / GB:.2g} GB, {free / GB:.1f} GB are free"
    status, remedy = (OK, "") if needed < free else (WARNING, "--dataset_cache_dir DIR: choose a disk with more room")
    yield Finding(status, f"cache {cache_root(args)}", found, remedy)
