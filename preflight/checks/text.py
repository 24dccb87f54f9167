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

from evaluation.mmlu_files import load_mmlu
from preflight.checks.basics import FAILURE, OK, WARNING, CheckSkipped, Finding, PlannedRun
from preflight.checks.machine import GB, default_nproc
from preflight.checks.models import separator_of, teacher_tokenizer
from preflight.checks.storage import folder_problem, nearest
from text.batch import MAKE_IT_FIT
from text.encoding import Encoder
from text.opening import NotCached, files_read_here, open_source, open_stream
from text.overlap import TrainedOn, check_not_trained_on
from text.rows import only_texts
from text.sources import Opened, TextSource, network_forbidden
from text.splits import split_names

ROWS = 16  # that are read of a split


def check_data(run: PlannedRun) -> Iterator[Finding]:
    args, step_windows = run.args, run.args.batch_size * default_nproc(run)  # of a micro step
    needed = step_windows
    if not args.dataset_streaming:  # a run on packed data needs enough for one optimizer step
        needed = max(needed, math.ceil(args.grad_accumulation_steps * step_windows / args.epochs))
    yield from _check_text(run, TextSource.for_training(args), "--dataset_name", needed)


def check_held_out_data(run: PlannedRun) -> Iterator[Finding]:
    args = run.args
    if not args.eval_interval:
        return
    held_out = TextSource.for_evaluation_in_training(args)
    yield from _check_text(run, held_out, "--eval_dataset_name", 1)
    yield from _check_not_trained_on(held_out, TextSource.for_training(args))
    if args.eval_mmlu_dir is not None:
        subjects = load_mmlu(args.eval_mmlu_dir, flag="--eval_mmlu_dir")
        yield Finding(OK, f"--eval_mmlu_dir {args.eval_mmlu_dir}", f"{len(subjects)} subjects")


def _check_not_trained_on(held_out: TextSource, training: TextSource) -> Iterator[Finding]:
    ours, its = (dataclasses.replace(source, local_files_only=True) for source in (held_out, training))
    try:
        check_not_trained_on(ours, its, "the run", may_count=False)
    except TrainedOn as error:
        yield Finding.of_error(FAILURE, f"--eval_dataset_name {held_out.name}", str(error))
    except ValueError:  # of opening, which is reported with the data
        return


def _check_text(run: PlannedRun, source: TextSource, flag: str, needed: int) -> Iterator[Finding]:
    """Yields the findings on one data set. needed: windows that its text has to fill."""
    name, seq_length = f"{flag} {source.name}", run.args.seq_length
    try:
        opened = open_here(source)
    except CheckSkipped:
        subset = "" if source.subset is None else f"'{source.subset}', "
        command = f"datasets.load_dataset('{source.name}', {subset}split='{source.split}')"
        remedy = f'python -c "import datasets; {command}"   where there is a network, or give a local file or directory'
        if source.local_files_only:
            yield Finding(FAILURE, name, f"not prepared in {source.cache_root}", remedy)
        else:
            yield Finding(WARNING, name, "not on this disk; a run would download it", remedy)
        return
    n_rows, texts = first_texts(opened, source)
    if texts:
        found = f"split {source.split!r}: {len(texts)} of the first {n_rows} rows have text, of "
        found += f"{sum(map(len, texts)) // len(texts):,} characters on average"
        yield Finding(OK, name, found)
    else:
        found = f"none of the first {n_rows} rows has text in column {source.text_field!r}"
        yield Finding(FAILURE, name, found, "--dataset_text_field: name the column that holds the text")
    if texts and n_rows < ROWS:  # the split has no more
        n_tokens, fewest = (
            len(Encoder(teacher_tokenizer(run), separator_of(run).token)(texts)),
            needed * (seq_length + 1),
        )
        if n_tokens < fewest:
            found = f"{n_tokens:,} tokens in all, expected {fewest:,}: {needed} window(s) of {seq_length + 1}"
            yield Finding(FAILURE, name, found, MAKE_IT_FIT)


def open_here(source: TextSource) -> Opened:
    """Opens data on this disk. Raises CheckSkipped for a data set of the hub that is not on it, and ValueError where a
    run does.
    """
    try:
        with network_forbidden(True):
            return open_source(dataclasses.replace(source, local_files_only=True))
    except NotCached as error:
        raise CheckSkipped("the data set is not on this disk") from error


def first_texts(opened: Opened, source: TextSource) -> tuple[int, list[str]]:
    """Returns how many rows of a split were read, its first ones, and the texts in them. Of a part such as
    "train[99%:]" the first rows of the whole split are read: finding the part takes a table of all rows.
    """
    files_read_here(opened, source)  # raises ValueError if --skip_bad_rows cannot be used with the split
    if isinstance(opened, datasets.DatasetBuilder):
        source = dataclasses.replace(source, split="+".join(split_names(source, opened.info.splits or ())))
    with network_forbidden(True):
        rows = list(open_stream(opened, source).take(ROWS))
    return len(rows), list(only_texts((row[source.text_field] for row in rows), source))


def check_room_for_packed_data(run: PlannedRun) -> Iterator[Finding]:
    """Estimates the rows as `datasets` keeps them, and their tokens. Compressed files take more than estimated."""
    args = run.args
    if args.dataset_streaming:
        return
    encoder = Encoder(teacher_tokenizer(run), separator_of(run).token)
    source = TextSource.for_training(args)
    place = nearest(source.cache_root)
    if problem := folder_problem(place):
        yield Finding(FAILURE, f"cache {source.cache_root}", problem, "--dataset_cache_dir DIR: choose one of your own")
        return
    try:
        opened = open_here(source)
        _, texts = first_texts(opened, source)
    except ValueError as error:  # reported by `check_data`
        raise CheckSkipped("the data cannot be read") from error
    ids = encoder(texts)
    if isinstance(opened, datasets.Dataset):
        files, copies = [file["filename"] for file in opened.cache_files], 0
    else:
        files, copies = [str(file) for split in (opened.config.data_files or {}).values() for file in split], 1
    sizes = [os.stat(file).st_size for file in files if os.path.exists(file)]
    if not sizes:  # a data set of the hub that was prepared before
        sizes, copies = [opened.info.dataset_size or 0], 0
    needed = sum(sizes) * (copies + ids.nbytes / max(1, sum(len(text.encode()) for text in texts)))
    free = shutil.disk_usage(place).free
    found = f"packing takes about {needed / GB:.2g} GB, {free / GB:.1f} GB are free"
    status, remedy = (OK, "") if needed < free else (WARNING, "--dataset_cache_dir DIR: choose a disk with more room")
    yield Finding(status, f"cache {source.cache_root}", found, remedy)
