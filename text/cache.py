"""The folder in which text is cached, `--dataset_cache_dir`: the tables of `datasets` with their downloads and locks,
and the packed tokens in `packed/` (token_file.py). Without the option it is the folder that `datasets` has for all.
"""

import errno
import functools
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from huggingface_hub import constants

from text.sources import TextSource

logger = logging.getLogger("train")

PACKED = "packed"
WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}  # errors that no reading has


def packed_folder(source: TextSource) -> Path:
    """Returns the folder that packed tokens are in."""
    return source.cache_root / PACKED


def check_writable(source: TextSource) -> None:
    """Makes the folder. Raises ValueError if it cannot be made or written."""
    if problem := _writing_problem(source.cache_root):
        raise _cache_error(source, problem)


def cache_fault(error: OSError, source: TextSource) -> ValueError:
    """Returns what to raise for an error of writing to the cache."""
    return _cache_error(source, f"cannot be written ({error.strerror or error})")


def full_cache(error: BaseException | None, source: TextSource) -> ValueError | None:
    """Returns what to raise for an error whose cause is that the cache cannot be written, or None for another one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in WRITING:
            return cache_fault(error, source)
        error = error.__cause__ or error.__context__
    return None


def _cache_error(source: TextSource, problem: str) -> ValueError:
    if source.cache_dir is not None:
        what, remedy = "--dataset_cache_dir", "name a folder of your own"
    else:
        what = "the cache of `datasets`,"
        remedy = "--dataset_cache_dir of train_gpus.py, or the environment variable HF_DATASETS_CACHE, names another"
    return ValueError(f"{what} {source.cache_root}: {problem}; {remedy}, on a disk with room for the text")


def folder_for_tables(source: TextSource) -> str:
    """Returns the folder that `datasets` gets for its tables and locks. Where the cache cannot be written it is another
    folder, for this process alone, with links to the tables of the cache: a stream needs no more than a lock, and what
    has been prepared or packed can still be read. Raises ValueError if the option names a folder that can be of no use.
    """
    root = source.cache_root
    if _writing_problem(root) is None:
        return str(root)
    folder = Path(_passing_folder(root).name)
    if source.cache_dir is not None and not os.path.isdir(packed_folder(source)) and not any(folder.iterdir()):
        check_writable(source)
    return str(folder)


def download_config(source: TextSource) -> datasets.DownloadConfig:
    """Returns how `datasets` gets files: into the cache, what it unpacks too."""
    downloads = source.cache_root / datasets.config.DOWNLOADED_DATASETS_DIR
    return datasets.DownloadConfig(cache_dir=downloads, local_files_only=source.local_files_only)


@contextmanager
def hub_files_in_cache(source: TextSource) -> Iterator[None]:
    """Has files of the hub downloaded to the folder, if the option names one. `datasets` does not say where to."""
    before = constants.HF_HUB_CACHE
    if source.cache_dir is not None:
        constants.HF_HUB_CACHE = str(source.cache_root / "hub")
    try:
        yield
    finally:
        constants.HF_HUB_CACHE = before


@functools.cache
def _passing_folder(root: Path) -> tempfile.TemporaryDirectory:
    """Makes a folder with a link to each table of the cache in `root`. It is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="datasets-")
    for table in _tables(root):
        link = Path(folder.name) / table.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(table.absolute())
    return folder


def _tables(root: Path) -> list[Path]:
    """Returns the folders of the tables in a cache: name / configuration / version / hash; some have no hash."""
    try:
        infos = [*root.glob(f"*/*/*/{datasets.config.DATASET_INFO_FILENAME}")]
        return [info.parent for info in (*infos, *root.glob(f"*/*/*/*/{datasets.config.DATASET_INFO_FILENAME}"))]
    except OSError:  # this user may not look there
        return []


def _writing_problem(folder: Path) -> str | None:
    """Returns why no file can be made in a folder, which is made if it can be, or None. Tries it: permissions do not
    show that a disk is read-only.
    """
    try:
        if folder.exists() and not folder.is_dir():
            return "is a file, expected a folder"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"cannot be written ({error.strerror})"
