"""Documents packed into one flat file of token ids: what it is made from, writing it, and waiting until it is there.
`data.PackedTextDataset` has its windows.

Every document is followed by the id of the separator (separators.py) and nothing else is added. The file does not
depend on the window length. It is written beside its final place and renamed when whole: what is found there is
finished.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import datasets
import numpy as np

from text.encoding import Encoder, text_batches
from text.sources import Opened, TextSource
from utils import flush_to_disk

logger = logging.getLogger("train")

DTYPES = ("uint16", "uint32")
FORMAT_VERSION = 1  # raise it when the same text would give another token file
TOKENS, ABOUT = "tokens.bin", "about.json"
ABANDONED_AFTER_S = 24 * 3600.0  # a build that wrote nothing for so long was killed


def token_file_inputs(opened: Opened, source: TextSource, encoder: Encoder) -> dict[str, object]:
    """Returns all that decides what a token file holds, as JSON. Local files count by size and time too, so that an
    edit is noticed.
    """
    if isinstance(opened, datasets.Dataset):
        fingerprint = opened._fingerprint
        files = [file["filename"] for file in opened.cache_files]
    else:
        # name / configuration / version / hash, of which a CsvBuilder has no hash
        fingerprint = Path(opened.cache_dir).relative_to(opened._cache_dir_root).as_posix()
        files = [file for split in (opened.config.data_files or {}).values() for file in split]
    stats = [(file, os.stat(file)) for file in sorted(files) if os.path.exists(file)]
    # Without bad rows to skip it is left out: token files from before that option stay valid.
    skips = {"skip_bad_rows": True} if source.skip_bad_rows else {}
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "files": [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats],
        "split": source.split,
        "text_field": source.text_field,
        "tokenizer": encoder.digest,
        "eos_id": encoder.separator_id,  # named so before it could be another token than the eos
        **skips,
    }


@dataclass(frozen=True)
class About:
    """Holds what a token file says of itself."""

    tokens: int
    dtype: np.dtype
    sha256: str | None  # of all tokens; files from before it was recorded have none

    @property
    def n_bytes(self) -> int:
        return self.tokens * self.dtype.itemsize


def read_about(directory: Path) -> About:
    """Returns what the token file in `directory` says of itself. Raises ValueError if that cannot be read, or the file
    is not as long as it says.
    """
    remedy = f"delete {directory}, and the next run tokenises the text again"
    try:
        size = (directory / TOKENS).stat().st_size
        about = _about_of(json.loads((directory / ABOUT).read_text(encoding="utf-8")))
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be read ({error.strerror}); mend that, or {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{directory / ABOUT}: is damaged ({error}); {remedy}") from error
    if size != about.n_bytes:
        raise ValueError(f"{directory / TOKENS}: {size} bytes, which is not {about.tokens} {about.dtype}; {remedy}")
    return about


def _about_of(content: Any) -> About:
    """Returns what about.json says. content: its JSON. Raises ValueError."""
    fields = content if isinstance(content, dict) else {}
    tokens, dtype, sha256 = (fields.get(name) for name in ("tokens", "dtype", "sha256"))
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
        raise ValueError('no "tokens", expected how many there are')
    if dtype not in DTYPES:
        raise ValueError(f'no "dtype", expected {" or ".join(DTYPES)}')
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
        raise ValueError('"sha256" is none')
    return About(tokens, np.dtype(dtype), sha256)


def write_token_file(directory: Path, texts: Iterable[str], encoder: Encoder, made_from: dict) -> None:
    """Tokenises `texts` into `directory`, which appears whole or not at all: `tokens.bin`, all ids one after another,
    and `about.json`, their number, dtype and SHA-256, with `made_from`.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f"{directory.name}.partial-{uuid.uuid4().hex}")
    partial.mkdir()
    _remove_abandoned(partial)
    started = time.monotonic()
    tokens = documents = 0
    digest = hashlib.sha256()
    try:
        with open(partial / TOKENS, "wb") as file:
            _lock(file)  # until the folder has its place
            for n_texts, ids in _encoded_ahead(encoder, text_batches(texts)):
                file.write(ids.data)  # its error, unlike that of `tofile`, says that the disk is full
                digest.update(ids.data)
                tokens += len(ids)
                documents += n_texts
            file.flush()
            about = {"tokens": tokens, "documents": documents, "dtype": encoder.dtype.name}
            about |= {"sha256": digest.hexdigest(), **made_from}
            (partial / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            for path in (partial / TOKENS, partial / ABOUT, partial):
                flush_to_disk(path)
            _publish(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    seconds = time.monotonic() - started
    logger.info("packed %d tokens of %d documents in %.1f s: %s", tokens, documents, seconds, directory)


def _encoded_ahead(encoder: Encoder, batches: Iterable[list[str]]) -> Iterator[tuple[int, np.ndarray]]:
    """Encodes in order, with two batches in progress. Yields the number of texts and the ids of each batch.

    The tokenizer releases the interpreter lock and uses all cores for one batch; turning its result into an array does
    not. With two threads one batch is converted while the next is tokenised.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        pending: deque[tuple[int, Future[np.ndarray]]] = deque()
        for batch in batches:
            pending.append((len(batch), pool.submit(encoder, batch)))
            if len(pending) > 2:
                n_texts, ids = pending.popleft()
                yield n_texts, ids.result()
        for n_texts, ids in pending:
            yield n_texts, ids.result()


def _publish(partial: Path, directory: Path) -> None:
    try:
        os.replace(partial, directory)
    except OSError:
        if not directory.exists():
            raise
        # Another job has built the same tokens. Its ranks may have them open, so ours are the ones to delete.
    else:
        flush_to_disk(directory.parent)


def _lock(file: IO[bytes]) -> bool:
    """Marks a build as live, while the file is open. Returns whether nobody else does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network disks have no locks
        pass
    return True


def _remove_abandoned(ours: Path) -> None:
    """Deletes what killed builds left beside ours. A live one has a lock, and writes to its file all the time: without
    a lock its age counts, by the clock of the disk, as our new folder shows it.
    """
    now = ours.stat().st_mtime
    for partial in ours.parent.glob("*.partial-*"):
        with contextlib.suppress(OSError):  # its build may finish meanwhile, or be another user's
            if partial.is_symlink():  # what it points to is not ours
                partial.unlink()
            elif partial.is_dir():
                written = max(path.lstat().st_mtime for path in (partial, *partial.iterdir()))
                if now - written > ABANDONED_AFTER_S and not _is_locked(partial / TOKENS):
                    shutil.rmtree(partial, ignore_errors=True)


def _is_locked(tokens: Path) -> bool:
    try:
        with open(tokens, "r+b") as file:
            return not _lock(file)
    except FileNotFoundError:  # killed before it was made
        return False


def wait_for_token_file(directory: Path, poll_s: float = 1.0) -> None:
    """Waits until another process has finished `directory`. It polls, because a collective would time out."""
    started = logged = time.monotonic()
    while not directory.exists():
        if time.monotonic() - logged >= 60:
            logged = time.monotonic()
            minutes = (logged - started) / 60
            logger.info("waiting for the packed dataset for %.0f min: %s", minutes, directory)
        time.sleep(poll_s)
