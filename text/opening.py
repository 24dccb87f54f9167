"""Opens a `TextSource`, as a table to be packed and cached or as a stream, and explains what cannot be read. Every
mistake in the options of the data is found here, before a model is loaded.
"""

import contextlib
import functools
import glob
import logging
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow as pa
from datasets.packaged_modules.cache.cache import Cache
from datasets.packaged_modules.text.text import Text

from paths import readable
from text.cache import check_writable, download_config, folder_for_tables, hub_files_in_cache
from text.csv_builder import CsvBuilder
from text.decoding import DAMAGED_ARCHIVE
from text.faults import Faults, explain_fault, local_files
from text.files import COMPRESSED, FILE_READERS, files_of_folder, reader_of_file, warn_of_ignored_files
from text.row_sizes import first_row_too_long
from text.rows import check_text_field
from text.saved import is_saved, open_saved
from text.sources import Opened, TextSource, is_part
from text.splits import no_rows, split_names, take_split
from text.tolerant_reader import columns_of, first_bad_row, tolerant_stream

logger = logging.getLogger("train")

SHARDS = 840  # of a part that is streamed: shuffled each epoch, and shared out whole among 1 to 8 ranks
Whole: TypeAlias = dict[str, datasets.Dataset] | datasets.DatasetBuilder

READ_ERRORS = (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, ValueError, *DAMAGED_ARCHIVE)


class NotCached(ValueError):
    """Says that a data set of the hub is not on this disk, where no network may be used."""


def open_source(source: TextSource) -> Opened:
    """Returns the data, not read yet: the rows of a `save_to_disk` folder, or a builder for files or a hub dataset.
    Raises ValueError if there is no such data, subset or split.
    """
    opened = open_whole(source)
    if isinstance(opened, datasets.DatasetBuilder):
        return opened
    return take_split({name: len(table) for name, table in opened.items()}, opened.__getitem__, source)


def open_whole(source: TextSource) -> Whole:
    """Returns what `open_source` does, but of a `save_to_disk` folder the splits that the source names, whole."""
    with readable(f"{source.flags.name} {source.name!r}", source.name):
        return _open_whole(source, local_path(source))


def _open_whole(source: TextSource, path: Path | None) -> Whole:
    flags = source.flags
    reader, files = source.name, None
    if path is not None:
        if source.revision is not None:
            raise ValueError(f"{flags.revision} {source.revision!r}: {source.name} is local; leave it out")
        saved = is_saved(path)
        if source.subset is not None and (saved or path.is_file()):
            raise ValueError(f"{flags.subset} {source.subset!r}: {source.name} has none; leave it out")
        if saved:
            return open_saved(path, source)
        reader, files = _reader_of(path, source)
    folder = folder_for_tables(source)
    try:
        builder = _load_builder(reader, files, source, folder)
        if isinstance(builder, Text):  # documents stand between blank lines; a line is none
            builder = _load_builder(reader, files, source, folder, sample_by="paragraph")
    except (OSError, ValueError, RuntimeError) as error:
        what = f"{flags.name} {source.name!r} (subset {source.subset!r}, revision {source.revision!r})"
        if path is None and source.local_files_only:
            raise NotCached(
                f"{what} is not in the cache {source.cache_root} and --local_files_only "
                f"forbids fetching it: run once without that flag, or give a file or directory ({error})"
            ) from error
        raise ValueError(f"{what} cannot be opened: {error}") from error
    split_names(source, _splits_of(builder))
    if isinstance(builder, CsvBuilder):
        _check_columns(local_files(builder, source), source)
    if path is not None and path.is_dir() and source.subset is None:
        warn_of_ignored_files(path, builder)
    if path is None:
        _check_hub(builder, source)
    return builder


def _reader_of(path: Path, source: TextSource) -> tuple[str, Any]:
    """Returns the name of what reads a file or a folder, and its files; they are None if `datasets` finds them."""
    if path.is_file():
        return reader_of_file(path, source), glob.escape(str(path))
    next(path.iterdir(), None)  # raises OSError if it cannot be listed: `datasets` finds no files then
    return files_of_folder(path, source) or (str(path), None)


def _load_builder(reader: str, files: Any, source: TextSource, folder: str, **more: str) -> datasets.DatasetBuilder:
    """Returns the builder that `datasets` has for the data. Its tables are in `folder`; a data set of the hub may also
    have been prepared in the cache that all programs share, which counts where the hub is out of reach.
    """
    if reader == "csv":
        return CsvBuilder(cache_dir=folder, data_files=files, text_field=source.text_field)
    load = functools.partial(
        datasets.load_dataset_builder,
        reader,
        name=source.subset,
        data_files=files,
        revision=source.revision,
        download_config=download_config(source),
        **more,
    )
    with hub_files_in_cache(source):
        try:
            return load(cache_dir=folder)
        except (OSError, ValueError, RuntimeError):
            if source.cache_dir is not None and local_path(source) is None:
                with contextlib.suppress(OSError, ValueError, RuntimeError):
                    return load(cache_dir=str(datasets.config.HF_DATASETS_CACHE))
            raise


def _check_hub(builder: datasets.DatasetBuilder, source: TextSource) -> None:
    """Raises ValueError for a part of a stream that would have all of a data set downloaded first."""
    flags = source.flags
    if source.streaming and is_part(source.split) and not Path(builder.cache_dir).exists():
        raise ValueError(
            f"{flags.split} {source.split!r}: a part is found by reading all rows, and {source.name} is not on "
            "this disk; leave out the part in brackets, or download all with --no_dataset_streaming"
        )
    if isinstance(builder, Cache) and source.revision not in (None, builder.hash):
        logger.warning("%s %s not checked: %s is cached", flags.revision, source.revision, builder.hash)


def local_path(source: TextSource) -> Path | None:
    """Returns the path that the source's name means, or None for a hub dataset. Raises ValueError if the name can only
    be a path and nothing is there.
    """
    name = source.name
    path = Path(name)
    with readable(f"{source.flags.name} {name!r}", path):
        if path.exists():
            return path
    has_ending = path.suffix.lower() in (*COMPRESSED, *FILE_READERS)
    if "://" not in name and (has_ending or name.startswith((".", "/")) or name.count("/") > 1):
        raise ValueError(f"{source.flags.name} {name!r}: no such file or directory; give a path or a hub dataset")
    return None


def _splits_of(builder: datasets.DatasetBuilder) -> list[str]:
    return [str(split) for split in builder.info.splits or builder.config.data_files or ()]


def open_table(opened: Opened, source: TextSource) -> datasets.Dataset | datasets.IterableDataset:
    """Returns the text column of the split as a memory-mapped table, or, if our own reader reads its files
    (`files_read_here`), as a stream. Raises ValueError.
    """
    if files := files_read_here(opened, source):
        return _open_tolerant(files, source)
    _check_sizes_of_rows(opened, source)
    if isinstance(opened, datasets.DatasetBuilder):
        prepare(opened, source)
        n_rows = {str(name): info.num_examples for name, info in opened.info.splits.items()}
        opened = take_split(n_rows, opened.as_dataset, source)
    check_text_field(opened.features, source)
    return opened.select_columns([source.text_field])


def prepare(builder: datasets.DatasetBuilder, source: TextSource) -> None:
    """Makes tables of all splits, in the cache of `datasets`, unless they are there. Raises ValueError."""
    if not Path(builder.cache_dir).exists():
        check_writable(source)
    faults = Faults(builder, source)
    try:
        with hub_files_in_cache(source):
            builder.download_and_prepare(download_config=download_config(source))
    except StopIteration as error:  # what `datasets` makes of an empty file
        raise no_rows(source) from error
    except READ_ERRORS as error:
        raise faults(error) from error
    if changed := faults.changed():
        raise ValueError(changed)


def open_stream(opened: Opened, source: TextSource) -> datasets.IterableDataset:
    """Returns the text column of the split as a stream whose first row can be read. A part of a split is streamed from
    a table, which is made first: only all rows say where it begins. Raises ValueError.
    """
    if files := files_read_here(opened, source):
        return _open_tolerant(files, source)
    if isinstance(opened, datasets.Dataset) or is_part(source.split):
        table = open_table(opened, source)
        assert isinstance(table, datasets.Dataset)
        # A whole one is one shard, as it has always been: streams that were begun must find their place.
        return table.to_iterable_dataset(num_shards=SHARDS if is_part(source.split) and len(table) >= SHARDS else 1)
    _check_sizes_of_rows(opened, source)
    try:
        stream = opened.as_streaming_dataset(split=source.split)
        first = list(stream.take(1))
    except StopIteration as error:
        raise no_rows(source) from error
    except READ_ERRORS as error:
        if _splits_of(opened):
            raise explain_fault(error, opened, source) from error
        raise ValueError(f"{source.flags.split} {source.split!r}: {error}") from error
    if not first:
        raise no_rows(source)
    check_text_field(stream.features or datasets.Dataset.from_list(first).features, source)
    return stream.select_columns([source.text_field])


def files_read_here(opened: Opened, source: TextSource) -> list[str]:
    """Returns the files of the split if bad rows are skipped and our own reader can read all of them, else none. Raises
    ValueError for a part of a split, which that reader does not know.
    """
    if not source.skip_bad_rows:
        return []
    files = local_files(opened, source)
    if files and "[" in source.split:
        raise ValueError(
            f"{source.flags.split} {source.split!r}: with --skip_bad_rows files are read whole, expected the names of "
            "splits; leave out the part in brackets"
        )
    if not files:
        logger.warning(
            "--skip_bad_rows: %s is read by `datasets`, which stops at a row that it cannot read; of those that it "
            "can, the ones that are no text are left out",
            source.name,
        )
    return files


def _open_tolerant(files: list[str], source: TextSource) -> datasets.IterableDataset:
    _check_columns(files, source)
    return tolerant_stream(files, source.text_field)


def _check_sizes_of_rows(opened: Opened, source: TextSource) -> None:
    """Raises ValueError if a compressed file that expands much holds a row too long, which `datasets` would read."""
    if bad := first_row_too_long(local_files(opened, source)):
        skip = source.flags.skip_bad_rows
        remedy = "split that row" + (f", or leave such rows out with {skip}" if skip else "")
        raise ValueError(f"{source.flags.name} {source.name!r} cannot be read: {bad}; {remedy}")


def _check_columns(files: list[str], source: TextSource) -> None:
    columns, flags = columns_of(files), source.flags
    if not columns:
        if bad := first_bad_row(files):
            raise ValueError(f"{flags.name} {source.name!r} cannot be read: {bad}; correct it")
        raise no_rows(source)
    if (n := columns.count(source.text_field)) > 1:
        raise ValueError(
            f"{flags.text_field} {source.text_field!r}: {n} columns of {source.name} have that name; rename the others"
        )
    # The rows' own types are looked at one by one.
    check_text_field(dict.fromkeys(columns, datasets.Value("string")), source)
