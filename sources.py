"""Where the text comes from: a hub dataset, a local directory, a file, or a `save_to_disk` folder, opened for the
cached lane as a table and for the streaming lane as a stream. Every mistake in its options is found here.
"""

import glob
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from datasets.packaged_modules.text.text import Text

from arguments import TrainArguments
from packing import FORMAT_VERSION, Encoder, check_text_field

logger = logging.getLogger("train")

SAVED_TO_DISK = ("state.json", "dataset_dict.json")
FILE_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


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
    available = [str(split) for split in builder.info.splits or builder.config.data_files or ()]
    check_split(args.dataset_split, available)
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


def file_ending(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


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


def check_split(split: str, available: list[str]) -> None:
    """`split` may be an expression ("train[:1%]+test"); `available` is empty where it is not known yet."""
    names = {part.split("[")[0].strip() for part in split.split("+")}
    if available and not names <= {*available, "all"}:
        raise split_error(split, available)


def split_error(split: str, available: list[str]) -> ValueError:
    return ValueError(f"--dataset_split {split!r}: no such split; available: {', '.join(available)}")


def open_table(source: datasets.Dataset | datasets.DatasetBuilder, args: TrainArguments) -> datasets.Dataset:
    """The whole dataset as a memory-mapped table."""
    if isinstance(source, datasets.DatasetBuilder):
        try:
            source.download_and_prepare(download_config=datasets.DownloadConfig(local_files_only=args.local_files_only))
        except datasets.exceptions.DatasetsError as error:
            raise ValueError(
                f"--dataset_name {args.dataset_name!r} cannot be read: {error.__cause__ or error}"
            ) from error
        try:
            source = source.as_dataset(split=args.dataset_split)
        except ValueError as error:
            raise ValueError(f"--dataset_split {args.dataset_split!r}: {error}") from error
    check_text_field(source.features, args.dataset_text_field)
    return source.select_columns([args.dataset_text_field])


def open_stream(source: datasets.Dataset | datasets.DatasetBuilder, args: TrainArguments) -> datasets.IterableDataset:
    if isinstance(source, datasets.Dataset):
        stream = source.to_iterable_dataset()
    else:
        try:
            stream = source.as_streaming_dataset(split=args.dataset_split)
        except ValueError as error:
            raise ValueError(f"--dataset_split {args.dataset_split!r}: {error}") from error
    first = list(stream.take(1))  # also finds data that cannot be read, before a model is loaded
    if not first:
        raise ValueError(f"--dataset_name {args.dataset_name!r}: split {args.dataset_split!r} has no rows")
    check_text_field(stream.features or datasets.Dataset.from_list(first).features, args.dataset_text_field)
    return stream.select_columns([args.dataset_text_field])


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
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "files": [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats],
        "split": args.dataset_split,
        "text_field": args.dataset_text_field,
        "tokenizer": encoder.digest,
        "eos_id": encoder.eos_id,
    }
