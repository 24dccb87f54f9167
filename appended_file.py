"""Files that a run appends lines to: metrics.jsonl, warnings.jsonl and the log file. Whatever happens to one of them,
the run continues, and its lines are written as soon as they can be. Imports nothing of ours.
"""

import logging
import os
import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path

logger = logging.getLogger("train")

# Returns what of the first content has to be appended to the second.
Missing = Callable[[bytes, bytes], bytes]


class AppendedFile:
    """Appends lines to a file without a buffer, so that a process that dies keeps them. What the file does not take,
    for example because the disk is full, is kept and written later. A file that is removed, moved or replaced meanwhile
    is noticed, and opened or made again under its name.
    """

    def __init__(self, path: Path, missing: Missing | None = None) -> None:
        """missing: of the content that the file had, returns what the one that is in its place now has to get, given
        both; None for nothing.
        """
        self.path, self.missing = path, missing
        self.file: FileIO | None = None
        self.unwritten = b""
        self.has_warned = False

    def open(self) -> None:
        """Opens the file, and makes it and its folder where they do not exist. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # The content of a removed file can still be read from what has it open.
        self.file = FileIO(self.path, "a" if self.missing is None else "a+")

    def append(self, lines: bytes = b"") -> None:
        """Appends lines, after those that are still unwritten."""
        self.unwritten += lines
        if self.file is None and not self.unwritten:
            return
        try:
            self._open_again()
            while self.unwritten:
                assert self.file is not None
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            self.has_warned = False
        except OSError as error:
            self._warn(error)

    def flush_to_disk(self) -> None:
        """Flushes the lines, so that they survive a loss of power."""
        self.append()
        try:
            if self.file is not None:
                os.fsync(self.file.fileno())
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        """Tries a last time to write what is unwritten, and closes the file."""
        if self.unwritten:
            self.append()
        n, self.unwritten = self.unwritten.count(b"\n"), b""
        if self.file is not None:
            self.file.close()
            self.file = None
        if n:
            logger.warning("%s: its last %d line(s) could not be written and are lost", self.path, n)

    def _open_again(self) -> None:
        """Opens the file if it is not open, or if another or none is in its place by now."""
        old = self.file
        if old is not None and is_at(self.path, old):
            return
        self.open()
        if old is None:
            return
        missing = self._missing_of(old)
        self.unwritten = missing + self.unwritten
        old.close()
        logger.warning(
            "%s was removed, moved or replaced during the run: opened again, %d line(s) restored",
            self.path,
            missing.count(b"\n"),
        )

    def _missing_of(self, old: FileIO) -> bytes:
        assert self.file is not None
        if self.missing is None:
            return b""
        try:
            before, now = content_of(old), content_of(self.file)
        except OSError:  # as of a file that another machine has removed from a network's disk
            return b""
        missing = self.missing(before, now)
        return b"\n" + missing if missing and now and not now.endswith(b"\n") else missing

    def _warn(self, error: OSError) -> None:
        """Reports the first of several errors in a row."""
        if not self.has_warned:
            self.has_warned = True  # first: this file may be where the warning goes
            logger.warning(
                "%s cannot be written (%s); its lines are kept, and written later", self.path, error.strerror
            )


def is_at(path: Path, file: FileIO) -> bool:
    """Returns whether the open file is the one at this path. Raises OSError if that cannot be found out."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except (FileNotFoundError, NotADirectoryError):
        return False


def content_of(file: FileIO) -> bytes:
    """Returns all of a file that is open for appending, whose next line comes at the end all the same."""
    file.seek(0)
    return file.readall()


class AppendingHandler(logging.Handler):
    """Shares one lock with all of its kind. Writing may log a warning, which every handler gets: with a lock of its own
    each, two that write in two threads would wait for each other for ever.
    """

    shared = threading.RLock()

    def createLock(self) -> None:
        super().createLock()  # registers the handler, so that a forked process gets a free lock
        self.lock = self.shared


class LogFile(AppendingHandler):
    """Appends what is logged to a file. After another program has moved the file away, a new one is begun."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file cannot be opened."""
        super().__init__()
        self.file = AppendedFile(path)
        self.file.open()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # arguments that do not fit their text
            self.handleError(record)
        else:
            self.file.append(line.encode(errors="backslashreplace") + b"\n")

    def close(self) -> None:
        self.file.close()
        super().close()
