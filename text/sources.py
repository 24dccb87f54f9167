"""Where the text comes from: a hub dataset, a local directory, a file, or a `save_to_disk` folder, opened for the
cached lane as a table and for the streaming lane as a stream. Every mistake in its options is found here.
"""

import glob
import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.packaged_modules.text.text import Text

from arguments import TrainArguments
from text.encoding import Encoder
from text.rows import check_text_field
from text.token_file import FORMAT_VERSION
from text.tolerant_reader import columns_of, file_ending, first_bad_row, is_readable_here, tolerant_stream

logger = logging.getLogger("train")

SAVED_TO_DISK = ("state.json", "dataset_dict.json")
FILE_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
READ_ERRORS = (datasets.exceptions.DatasetsError, pa.ArrowException, OSError, EOFError, ValueError, zlib.error)


@contextmanager
def network_forbidden(forbidden: bool) -> Iterator[None]:
    """`datasets` reads HF_HUB_OFFLINE when it is imported; this has the same effect afterwards."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or forbidden
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def cache_root(args: TrainArguments) -> Path:
    return Path(args.dataset_cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser()


def open_source(args: TrainArguments) -> datasets.Dataset | datasets.DatasetBuilder:
    """The named data, not read yet: a `save_to_disk` folder, or a builder for files or a hub dataset."""
    name = args.dataset_name
    path = local_path(name)
    reader, files = name, None
    if path is not None:
        if args.dataset_revision is not None:
            raise ValueError(f"--dataset_revision {args.dataset_revision!r}: {name} is local; leave it out")
        reader, is_saved = str(path), any((path / mark).exists() for mark in SAVED_TO_DISK)
        if args.dataset_subset is not None and (is_saved or path.is_file()):
            raise ValueError(f"--dataset_subset {args.dataset_subset!r}: {name} has none; leave it out")
        if is_saved:
            return open_saved(path, args.dataset_split)
        if path.is_file():
            reader, files = file_reader(path), glob.escape(str(path))
    try:
        settings = dict(
            name=args.dataset_subset,
            data_files=files,
            revision=args.dataset_revision,
            download_config=datasets.DownloadConfig(local_files_only=args.local_files_only),
        )
        builder = datasets.load_dataset_builder(reader, **settings)
        if isinstance(builder, Text):  # a line is no document; what stands between blank lines is
            builder = datasets.load_dataset_builder(reader, **settings, sample_by="paragraph")
    except (OSError, ValueError, RuntimeError) as error:
        what = f"--dataset_name {name!r} (subset {args.dataset_subset!r}, revision {args.dataset_revision!r})"
        if path is None and args.local_files_only:
            raise ValueError(
                f"{what} is not in the cache {datasets.config.HF_DATASETS_CACHE} and --local_files_only "
                f"forbids fetching it: run once without that flag, or give a file or directory ({error})"
            ) from error
        raise ValueError(f"{what} cannot be opened: {error}") from error
    check_split(args.dataset_split, splits_of(builder))
    if path is not None and path.is_dir() and args.dataset_subset is None:
        warn_of_ignored_files(path, builder)
    if args.local_files_only and args.dataset_revision not in (None, builder.hash):
        logger.warning("--dataset_revision %s not checked: %s is cached", args.dataset_revision, builder.hash)
    return builder


def local_path(name: str) -> Path | None:
    """The path that `name` means, or None for the name of a hub dataset."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    has_ending = path.suffix in (".gz", *FILE_READERS)
    if "://" not in name and (has_ending or name.startswith((".", "~", "/")) or name.count("/") > 1):
        raise ValueError(f"--dataset_name {name!r}: no such file or directory; give a path or a hub dataset")
    return None


def file_reader(path: Path) -> str:
    reader = FILE_READERS.get(file_ending(path))
    if reader is None or (reader == "parquet" and path.suffix == ".gz"):
        raise ValueError(
            f"--dataset_name {str(path)!r}: unsupported file ending, expected one of "
            f"{', '.join(FILE_READERS)} (all but .parquet also with .gz); convert the file"
        )
    return reader


def warn_of_ignored_files(directory: Path, builder: datasets.DatasetBuilder) -> None:
    """`datasets` reads the files of the commonest kind in a directory and passes over the others in silence."""
    read = {file for split in (builder.config.data_files or {}).values() for file in split}
    found = sorted(str(path.resolve()) for path in directory.rglob("*") if file_ending(path) in FILE_READERS)
    if ignored := [file for file in found if file not in read]:
        logger.warning("%d file(s) of %s are not read, for example %s", len(ignored), directory, ignored[0])


def open_saved(path: Path, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(path))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or split): saved}
    if split not in splits:
        raise split_error(split, list(splits))
    return splits[split]


def splits_of(builder: datasets.DatasetBuilder) -> list[str]:
    return [str(split) for split in builder.info.splits or builder.config.data_files or ()]


def check_split(split: str, available: list[str]) -> None:
    """`split` may be an expression ("train[:1%]+test"); `available` is empty where it is not known yet."""
    names = {part.split("[")[0].strip() for part in split.split("+")}
    if available and not names <= {*available, "all"}:
        raise split_error(split, available)


def split_error(split: str, available: list[str]) -> ValueError:
    return ValueError(f"--dataset_split {split!r}: no such split; available: {', '.join(available)}")


def open_table(
    source: datasets.Dataset | datasets.DatasetBuilder, args: TrainArguments
) -> datasets.Dataset | datasets.IterableDataset:
    """The whole dataset as a memory-mapped table, or with --skip_bad_rows and files of our own as a stream."""
    if files := files_read_here(source, args):
        return open_tolerant(files, args)
    if isinstance(source, datasets.DatasetBuilder):
        try:
            source.download_and_prepare(download_config=datasets.DownloadConfig(local_files_only=args.local_files_only))
        except StopIteration as error:  # what `datasets` makes of an empty file
            raise no_rows(args) from error
        except READ_ERRORS as error:
            raise explain_fault(error, source, args) from error
        try:
            source = source.as_dataset(split=args.dataset_split)
        except ValueError as error:
            raise ValueError(f"--dataset_split {args.dataset_split!r}: {error}") from error
    check_text_field(source.features, args.dataset_text_field)
    return source.select_columns([args.dataset_text_field])


def open_stream(source: datasets.Dataset | datasets.DatasetBuilder, args: TrainArguments) -> datasets.IterableDataset:
    if files := files_read_here(source, args):
        return open_tolerant(files, args)
    if isinstance(source, datasets.Dataset):
        stream = source.to_iterable_dataset()
    else:
        try:
            stream = source.as_streaming_dataset(split=args.dataset_split)
        except StopIteration as error:
            raise no_rows(args) from error
        except READ_ERRORS as error:
            if args.dataset_split in splits_of(source):
                raise explain_fault(error, source, args) from error
            raise ValueError(f"--dataset_split {args.dataset_split!r}: {error}") from error
    try:
        first = list(stream.take(1))  # also finds data that cannot be read, before a model is loaded
    except READ_ERRORS as error:
        raise explain_fault(error, source, args) from error
    if not first:
        raise no_rows(args)
    check_text_field(stream.features or datasets.Dataset.from_list(first).features, args.dataset_text_field)
    return stream.select_columns([args.dataset_text_field])


def no_rows(args: TrainArguments) -> ValueError:
    return ValueError(f"--dataset_name {args.dataset_name!r}: split {args.dataset_split!r} has no rows")


# ---- rows that cannot be read


def local_files(source: datasets.Dataset | datasets.DatasetBuilder, split: str) -> list[str]:
    """The files of a split if our own reader can read all of them; `split` may be a sum of splits."""
    if isinstance(source, datasets.Dataset):
        return []
    by_split = {str(name): files for name, files in (source.config.data_files or {}).items()}
    names = list(by_split) if split == "all" else [part.split("[")[0].strip() for part in split.split("+")]
    files = [str(file) for name in names for file in by_split.get(name, ())]
    return files if all(is_readable_here(file) for file in files) else []


def files_read_here(source: datasets.Dataset | datasets.DatasetBuilder, args: TrainArguments) -> list[str]:
    if not args.skip_bad_rows:
        return []
    files = local_files(source, args.dataset_split)
    if files and "[" in args.dataset_split:
        raise ValueError(
            f"--dataset_split {args.dataset_split!r}: with --skip_bad_rows files are read whole, expected the names of "
            "splits; leave out the part in brackets"
        )
    if not files:
        logger.warning(
            "--skip_bad_rows: %s is read by `datasets`, which stops at a row that it cannot read; of those that it "
            "can, the ones that are no text are left out",
            args.dataset_name,
        )
    return files


def open_tolerant(files: list[str], args: TrainArguments) -> datasets.IterableDataset:
    columns = columns_of(files)
    if not columns:
        raise no_rows(args)
    # the rows' own types are looked at one by one
    check_text_field(dict.fromkeys(columns, datasets.Value("string")), args.dataset_text_field)
    return tolerant_stream(files, args.dataset_text_field)


def explain_fault(
    error: Exception, source: datasets.Dataset | datasets.DatasetBuilder, args: TrainArguments
) -> ValueError:
    """An error of reading, with the file and the row that caused it where they can be found."""
    what = f"--dataset_name {args.dataset_name!r} cannot be read"
    reason = f"{error.__cause__ or error}"
    # the table is made of all splits at once, so that the fault may lie in another than the one asked for
    files = [file for split in (args.dataset_split, "all") for file in local_files(source, split)]
    if not files:
        return ValueError(f"{what}: {reason}")
    logger.info("looking for the row that cannot be read in %d files", len(files))
    try:
        bad = first_bad_row(list(dict.fromkeys(files)))
    except OSError as unreadable:  # the disk, not what is on it
        return ValueError(f"{what}: {unreadable}")
    if bad is not None:
        return ValueError(f"{what}: {bad}; correct it, or leave such rows out with --skip_bad_rows ({reason})")
    return ValueError(f"{what}: {reason}; --skip_bad_rows reads the rows that can be read")


def describe(
    source: datasets.Dataset | datasets.DatasetBuilder, args: TrainArguments, encoder: Encoder
) -> dict[str, object]:
    """All that decides what the token file holds. Local files by size and time too: an edit is seen."""
    if isinstance(source, datasets.Dataset):
        fingerprint = source._fingerprint
        files = [file["filename"] for file in source.cache_files]
    else:
        fingerprint = "/".join(Path(source.cache_dir).parts[-4:])  # name / configuration / version / hash
        files = [file for split in (source.config.data_files or {}).values() for file in split]
    stats = [(file, os.stat(file)) for file in sorted(files) if os.path.exists(file)]
    skips = {"skip_bad_rows": True} if args.skip_bad_rows else {}  # what was packed before there was a choice is good
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "files": [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats],
        "split": args.dataset_split,
        "text_field": args.dataset_text_field,
        "tokenizer": encoder.digest,
        "eos_id": encoder.eos_id,
        **skips,
    }
