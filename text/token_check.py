"""Compares a token file with the hash that was recorded when it was written. A file that was overwritten, or damaged by
its disk, has the right length all the same, and a run would learn whatever is in it.

One process of each node reads the file once. A large file is read in the background while models load and training
begins. The first update does not wait for that, but no checkpoint is written before the file is known to be whole, and
a second save, or a run that is asked to stop, waits for the first.
"""

import contextlib
import functools
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import BinaryIO, cast

import psutil

from text.token_file import TOKENS, About
from utils import format_duration, in_background

logger = logging.getLogger("train")

AT_ONCE = 2**28  # bytes; a file that is not larger is read before a model is loaded
BLOCK = 2**24  # bytes that are read at a time
LOG_EVERY_S = 60.0

Hash = Future[str | None]  # None: of a file without one that another process reads


class DamagedTokens(ValueError):
    """Says that a token file is not what it should be, which no other try cures."""


def recorded_hash(about: About) -> Hash:
    """Returns the hash as it was recorded, for a process that leaves the reading to another."""
    recorded: Hash = Future()
    recorded.set_result(about.sha256)
    return recorded


def verified_hash(directory: Path, about: About, expected: str | None) -> Hash:
    """Returns the SHA-256 of the tokens that are there. Raises DamagedTokens, at once for a small file and from the
    result for a large one, if it is not what `about` records, or not what a checkpoint expects.
    """
    if about.sha256 is None and expected is None:
        logger.warning("%s has no hash: damage would not be noticed; delete it to have it made anew", directory)
    with _explaining(directory):
        file = (directory / TOKENS).open("rb", buffering=0)  # now: the folder may be removed during the run
    compare = functools.partial(_compare, cast(BinaryIO, file), directory, about.sha256, expected)
    if about.n_bytes > AT_ONCE:
        return in_background("token-check", compare)
    read: Hash = Future()
    read.set_result(compare())
    return read


def _compare(file: BinaryIO, directory: Path, recorded: str | None, expected: str | None) -> str:
    with _explaining(directory), file:
        found = _read(file, directory)
    if recorded is not None and found != recorded:
        raise DamagedTokens(
            f"{directory / TOKENS} is not what was written: its SHA-256 differs; delete {directory}, and the next run "
            "tokenises the text again"
        )
    if expected is not None and found != expected:
        raise DamagedTokens(
            f"{directory / TOKENS} holds other tokens than when the checkpoint was written: its SHA-256 differs; "
            f"delete {directory}, and the next run tokenises the text again"
        )
    return found


def _read(file: BinaryIO, directory: Path) -> str:
    """Returns the SHA-256 of an open token file."""
    size = os.fstat(file.fileno()).st_size
    # What is read stays in memory, where training finds it, unless it would drive out everything else.
    keeps = size < psutil.virtual_memory().available // 2
    digest, block, done = hashlib.sha256(), memoryview(bytearray(min(BLOCK, max(size, 1)))), 0
    began = logged = time.monotonic()
    while n := file.readinto(block):  # type: ignore[attr-defined]
        digest.update(block[:n])
        if not keeps:
            os.posix_fadvise(file.fileno(), done, n, os.POSIX_FADV_DONTNEED)
        done += n
        if time.monotonic() - logged > LOG_EVERY_S:
            logged = time.monotonic()
            logger.info("checked %.1f of %.1f GB of %s", done / 1e9, size / 1e9, directory)
    if size > AT_ONCE:
        logger.info("%s is as it was written: read in %s", directory, format_duration(time.monotonic() - began))
    return digest.hexdigest()


@contextlib.contextmanager
def _explaining(directory: Path) -> Iterator[None]:
    """Turns an OSError of reading into one line."""
    try:
        yield
    except OSError as error:
        raise DamagedTokens(
            f"{directory / TOKENS}: cannot be read ({error.strerror}); look at its disk, or name another with "
            "--dataset_cache_dir"
        ) from error
