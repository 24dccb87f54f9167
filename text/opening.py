"""Opens a `TextSource`, as a table to be packed and cached or as a stream, and explains what cannot be read. Every
mistake in the options of the data is found here, before a model is loaded.
"""

import glob
import logging
import zlib
from pathlib import Path
from typing import TypeAlias

import datasets
import pyarrow as pa
from datasets.packaged_modules.text.text import Text

from text.row_limit import may_hold_too_long_a_row, too_long
from text.rows import check_text_field
from text.sources import TextSource
from text.tolerant_reader import columns_of, file_ending, first_bad_row, is_readable_here, tolerant_stream

logger = logging.getLogger("train")

Opened: TypeAlias = datasets.Dataset | datasets.DatasetBuilder

SAVED_TO_DISK = ("state.json", "dataset_dict.json")
FILE_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
READ_ERRORS = (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, EOFError, ValueError, zlib.error)


class NotCached(ValueError):
    """Says that a data set of the hub is not on this disk, where no network may be used."""


def open_source(source: TextSource) -> Opened:
    """Returns the data, not read yet: the table of a `save_to_disk` folder, or a builder for files or a hub dataset.
    Raises ValueError if there is no such data, subset or split.
    """
    flags, path = source.flags, local_path(source)
    reader, files = source.name, None
    if path is not None:
        if source.revision is not None:
            raise ValueError(f"{flags.revision} {source.revision!r}: {source.name} is local; leave it out")
        reader, is_saved = str(path), any((path / mark).exists() for mark in SAVED_TO_DISK)
        if source.subset is not None and (is_saved or path.is_file()):
            raise ValueError(f"{flags.subset} {source.subset!r}: {source.name} has none; leave it out")
        if is_saved:
            return _open_saved(path, source)
        if path.is_file():
            reader, files = _file_reader(path, flags.name), glob.escape(str(path))
    try:
        settings = dict(
            name=source.subset,
            data_files=files,
            revision=source.revision,
            download_config=datasets.DownloadConfig(local_files_only=source.local_files_only),
        )
        builder = datasets.load_dataset_builder(reader, **settings)
        if isinstance(builder, Text):  # documents stand between blank lines; a line is none
            builder = datasets.load_dataset_builder(reader, **settings, sample_by="paragraph")
    except (OSError, ValueError, RuntimeError) as error:
        what = f"{flags.name} {source.name!r} (subset {source.subset!r}, revision {source.revision!r})"
        if path is None and source.local_files_only:
            raise NotCached(
                f"{what} is not in the cache {datasets.config.HF_DATASETS_CACHE} and --local_files_only "
                f"forbids fetching it: run once without that flag, or give a file or directory ({error})"
            ) from error
        raise ValueError(f"{what} cannot be opened: {error}") from error
    _check_split(source, _splits_of(builder))
    if path is not None and path.is_dir() and source.subset is None:
        _warn_of_ignored_files(path, builder)
    if source.local_files_only and source.revision not in (None, builder.hash):
        logger.warning("%s %s not checked: %s is cached", flags.revision, source.revision, builder.hash)
    return builder


def local_path(source: TextSource) -> Path | None:
    """Returns the path that the source's name means, or None for a hub dataset. Raises ValueError if the name can only
    be a path and nothing is there.
    """
    name = source.name
    path = Path(name).expanduser()
    if path.exists():
        return path
    has_ending = path.suffix in (".gz", *FILE_READERS)
    if "://" not in name and (has_ending or name.startswith((".", "~", "/")) or name.count("/") > 1):
        raise ValueError(f"{source.flags.name} {name!r}: no such file or directory; give a path or a hub dataset")
    return None


def _open_saved(path: Path, source: TextSource) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(path))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or source.split): saved}
    if source.split not in splits:
        raise _split_error(source, list(splits))
    return splits[source.split]


def _file_reader(path: Path, flag: str) -> str:
    reader = FILE_READERS.get(file_ending(path))
    if reader is None or (reader == "parquet" and path.suffix == ".gz"):
        raise ValueError(
            f"{flag} {str(path)!r}: unsupported file ending, expected one of "
            f"{', '.join(FILE_READERS)} (all but .parquet also with .gz); convert the file"
        )
    return reader


def _splits_of(builder: datasets.DatasetBuilder) -> list[str]:
    return [str(split) for split in builder.info.splits or builder.config.data_files or ()]


def _check_split(source: TextSource, available: list[str]) -> None:
    """Raises ValueError for a split that is not there. A split may be an expression ("train[:1%]+test"); `available` is
    empty where it is not known yet.
    """
    names = {part.split("[")[0].strip() for part in source.split.split("+")}
    if available and not names <= {*available, "all"}:
        raise _split_error(source, available)


def _split_error(source: TextSource, available: list[str]) -> ValueError:
    return ValueError(f"{source.flags.split} {source.split!r}: no such split; available: {', '.join(available)}")


def _warn_of_ignored_files(directory: Path, builder: datasets.DatasetBuilder) -> None:
    """Logs that files are left out: `datasets` reads those of the commonest kind in a directory and is silent about the
    others.
    """
    read = {file for split in (builder.config.data_files or {}).values() for file in split}
    found = sorted(str(path.resolve()) for path in directory.rglob("*") if file_ending(path) in FILE_READERS)
    if ignored := [file for file in found if file not in read]:
        logger.warning("%d file(s) of %s are not read, for example %s", len(ignored), directory, ignored[0])


def open_table(opened: Opened, source: TextSource) -> datasets.Dataset | datasets.IterableDataset:
    """Returns the text column of the whole split as a memory-mapped table, or, if our own reader reads its files
    (`files_read_here`), as a stream. Raises ValueError.
    """
    if files := files_read_here(opened, source):
        return _open_tolerant(files, source)
    _check_sizes_of_rows(opened, source)
    if isinstance(opened, datasets.DatasetBuilder):
        config = datasets.DownloadConfig(local_files_only=source.local_files_only)
        try:
            opened.download_and_prepare(download_config=config)
        except StopIteration as error:  # what `datasets` makes of an empty file
            raise _no_rows(source) from error
        except READ_ERRORS as error:
            raise explain_fault(error, opened, source) from error
        try:
            opened = opened.as_dataset(split=source.split)
        except ValueError as error:
            raise ValueError(f"{source.flags.split} {source.split!r}: {error}") from error
    check_text_field(opened.features, source)
    return opened.select_columns([source.text_field])


def open_stream(opened: Opened, source: TextSource) -> datasets.IterableDataset:
    """Returns the text column of the split as a stream whose first row can be read. Raises ValueError."""
    if files := files_read_here(opened, source):
        return _open_tolerant(files, source)
    _check_sizes_of_rows(opened, source)
    if isinstance(opened, datasets.Dataset):
        stream = opened.to_iterable_dataset()
    else:
        try:
            stream = opened.as_streaming_dataset(split=source.split)
        except StopIteration as error:
            raise _no_rows(source) from error
        except READ_ERRORS as error:
            if source.split in _splits_of(opened):
                raise explain_fault(error, opened, source) from error
            raise ValueError(f"{source.flags.split} {source.split!r}: {error}") from error
    try:
        first = list(stream.take(1))
    except READ_ERRORS as error:
        raise explain_fault(error, opened, source) from error
    if not first:
        raise _no_rows(source)
    check_text_field(stream.features or datasets.Dataset.from_list(first).features, source)
    return stream.select_columns([source.text_field])


def files_read_here(opened: Opened, source: TextSource) -> list[str]:
    """Returns the files of the split if bad rows are skipped and our own reader can read all of them, else none. Raises
    ValueError for a part of a split, which that reader does not know.
    """
    if not source.skip_bad_rows:
        return []
    files = _local_files(opened, source.split)
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


def _local_files(opened: Opened, split: str) -> list[str]:
    """Returns the files of a split, or sum of splits, if our own reader can read all of them, else none."""
    if isinstance(opened, datasets.Dataset):
        return []
    by_split = {str(name): files for name, files in (opened.config.data_files or {}).items()}
    names = list(by_split) if split == "all" else [part.split("[")[0].strip() for part in split.split("+")]
    files = [str(file) for name in names for file in by_split.get(name, ())]
    return files if all(is_readable_here(file) for file in files) else []


def _open_tolerant(files: list[str], source: TextSource) -> datasets.IterableDataset:
    columns = columns_of(files)
    if not columns:
        raise _no_rows(source)
    # The rows' own types are looked at one by one.
    check_text_field(dict.fromkeys(columns, datasets.Value("string")), source)
    return tolerant_stream(files, source.text_field)


def _check_sizes_of_rows(opened: Opened, source: TextSource) -> None:
    """Raises ValueError if a compressed file that expands much holds a row too long, which `datasets` would read."""
    files = list(filter(may_hold_too_long_a_row, _local_files(opened, source.split)))
    if files and (bad := first_bad_row(files)) and bad.reason == too_long():
        skip = source.flags.skip_bad_rows
        remedy = "split that row" + (f", or leave such rows out with {skip}" if skip else "")
        raise ValueError(f"{source.flags.name} {source.name!r} cannot be read: {bad}; {remedy}")


def _no_rows(source: TextSource) -> ValueError:
    return ValueError(f"{source.flags.name} {source.name!r}: split {source.split!r} has no rows")


def explain_fault(error: Exception, opened: Opened, source: TextSource) -> ValueError:
    """Returns what to raise for an error of reading: it names the file and the row where they can be found."""
    what, skip = f"{source.flags.name} {source.name!r} cannot be read", source.flags.skip_bad_rows
    reason = f"{error.__cause__ or error}"
    # A table is made of all splits at once, so the fault may lie in another split than the one asked for.
    files = [file for split in (source.split, "all") for file in _local_files(opened, split)]
    if not files:
        return ValueError(f"{what}: {reason}")
    logger.info("looking for the row that cannot be read in %d files", len(files))
    try:
        bad = first_bad_row(list(dict.fromkeys(files)))
    except OSError as unreadable:  # the disk, not what is on it
        return ValueError(f"{what}: {unreadable}")
    if bad is not None:
        remedy = f", or leave such rows out with {skip}" if skip else ""
        return ValueError(f"{what}: {bad}; correct it{remedy} ({reason})")
    return ValueError(f"{what}: {reason}" + (f"; {skip} reads the rows that can be read" if skip else ""))
