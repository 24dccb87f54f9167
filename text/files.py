"""Files of text: what their endings say, which files of a folder are read, and which are not. Upper-case endings count
like the others.
"""

import functools
import importlib.util
import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import datasets
from datasets.data_files import DataFilesDict, DataFilesList, EmptyDatasetError, get_data_patterns
from datasets.load import dataset_module_factory
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

from text.sources import TextSource

logger = logging.getLogger("train")

FilesBySplit: TypeAlias = dict[str, DataFilesList]

FILE_READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}
COMPRESSED = (".gz", ".zst")
# Of as many files of each, the kind that comes later is read, as `datasets` has it.
ALMOST_FIRST = (".csv", ".json", ".jsonl", ".arrow", ".parquet")
CARDS = ("README.md", ".huggingface.yaml")  # may say which files make which subset
NO_TEXT = {"dataset_info.json", "dataset_infos.json"}  # of `datasets`: nobody misses them


@dataclass(frozen=True)
class Stamp:
    """Holds what shows whether a file is as it was. Some network disks give a file another inode now and then."""

    size: int  # bytes
    time_ns: int

    @classmethod
    def of(cls, file: str) -> "Stamp | None":
        """Returns the stamp of a local file, or None for what is none."""
        try:
            stat = os.stat(file)
        except OSError:
            return None
        return cls(stat.st_size, stat.st_mtime_ns)


def compression(path: Path) -> str:
    """Returns the ending that says how a file is compressed, or ""."""
    return path.suffix.lower() if path.suffix.lower() in COMPRESSED else ""


def file_ending(path: Path) -> str:
    """Returns the ending that says what a file holds, in lower case and without that of a compression."""
    return (path.with_suffix("") if compression(path) else path).suffix.lower()


def reader_of(path: Path) -> str | None:
    """Returns the name of what reads a file, or None for a file of another kind."""
    reader = FILE_READERS.get(file_ending(path))
    return None if reader == "parquet" and compression(path) else reader


def reader_of_file(path: Path, source: TextSource) -> str:
    """Returns the name of what reads a file that the source names. Raises ValueError for a file of another kind."""
    reader = reader_of(path)
    if reader is None:
        raise ValueError(
            f"{source.flags.name} {str(path)!r}: unsupported file ending, expected one of {', '.join(FILE_READERS)} "
            f"(all but .parquet also with {' or '.join(COMPRESSED)}); convert the file"
        )
    check_unpacking([str(path)], source)
    return reader


def check_unpacking(files: list[str], source: TextSource) -> None:
    """Raises ValueError if a file is compressed in a way that nothing installed can read."""
    packed = [file for file in files if compression(Path(file)) == ".zst"]
    if packed and not importlib.util.find_spec("zstandard"):
        raise ValueError(
            f"{source.flags.name} {source.name!r}: {packed[0]} needs the package zstandard, which is not installed; "
            "pip install zstandard, or decompress the file"
        )


def files_of_folder(folder: Path, source: TextSource) -> tuple[str, FilesBySplit] | None:
    """Returns the files of a folder by split, those of the commonest kind, and the name of what reads them. None is for
    `datasets` to decide: a folder with a card that may list its files, without files of a kind in FILE_READERS, or of
    which `datasets` reads the same files; tables and tokens that were cached of the folder are then found. Raises
    ValueError for files that cannot be unpacked.
    """
    if source.subset is not None or any(_has_settings(folder / card) for card in CARDS):
        return None
    base = str(folder.resolve())
    try:
        found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    except (EmptyDatasetError, FileNotFoundError):
        return None
    endings = Counter(file_ending(Path(file)) for files in found.values() for file in files if _counts(Path(file)))
    if not endings:
        return None
    commonest = max(endings, key=lambda ending: (endings[ending], _rank(ending), ending))
    reader = FILE_READERS.get(commonest)
    if reader is None:
        return None
    by_split = {split: _of_reader(files, reader) for split, files in found.items()}
    by_split = {split: files for split, files in by_split.items() if files}
    check_unpacking([file for files in by_split.values() for file in files], source)
    return None if _datasets_reads(folder, reader, by_split) else (reader, by_split)


def _datasets_reads(folder: Path, reader: str, by_split: FilesBySplit) -> bool:
    """Returns whether `datasets`, given only the folder, reads these files in this way."""
    if reader == "csv":  # our own (csv_builder.py)
        return False
    try:
        module = dataset_module_factory(str(folder))
    except (OSError, ValueError, RuntimeError):
        return False
    configs = module.builder_configs_parameters.builder_configs or []
    is_same_reader = module.module_path == _PACKAGED_DATASETS_MODULES[reader][0]
    return is_same_reader and [config.data_files for config in configs] == [by_split]


def _counts(path: Path) -> bool:
    return reader_of(path) is not None or file_ending(path) == ".arrow"  # which `datasets` reads


def _rank(ending: str) -> int:
    return ALMOST_FIRST.index(ending) if ending in ALMOST_FIRST else -1


def _has_settings(card: Path) -> bool:
    return card.is_file() and (card.suffix == ".yaml" or card.read_bytes().startswith(b"---"))


def _of_reader(files: DataFilesList, reader: str) -> DataFilesList:
    chosen = [i for i, file in enumerate(files) if reader_of(Path(file)) == reader]
    return DataFilesList([files[i] for i in chosen], [files.origin_metadata[i] for i in chosen])


def warn_of_ignored_files(folder: Path, builder: datasets.DatasetBuilder) -> None:
    """Logs, once, that files of a folder are left out, whatever they are. Hidden ones are nobody's text."""
    base = folder.resolve()
    read = {file for split in (builder.config.data_files or {}).values() for file in split}
    found = (path for path in base.rglob("*") if path.name not in NO_TEXT and path.is_file())
    ignored = sorted(
        str(path)
        for path in found
        if str(path) not in read and not any(part.startswith(".") for part in path.relative_to(base).parts)
    )
    if ignored:
        _warn_once(f"{len(ignored)} file(s) of {folder} are not read, for example {ignored[0]}")


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning(text)
