"""warnings.jsonl: the warnings of all ranks, with their time, beside the log."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from appended_file import AppendedFile, AppendingHandler
from monitoring.progress_bar import LOGGERS


@contextlib.contextmanager
def recording_warnings(rank: int) -> "Iterator[WarningsFile]":
    """Records warnings and errors that are logged within the block in warnings.jsonl, which all ranks may share."""
    handler = WarningsFile(rank)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for log in loggers:
        log.addHandler(handler)
    try:
        yield handler
    finally:
        for log in loggers:
            log.removeHandler(handler)
        handler.close()


class WarningsFile(AppendingHandler):
    """Appends each warning to a file, and holds those that come before `write_to` has named it."""

    def __init__(self, rank: int) -> None:
        super().__init__(logging.WARNING)
        self.rank, self.early = rank, b""
        self.file: AppendedFile | None = None

    def write_to(self, folder: Path) -> None:
        self.file = AppendedFile(folder / "warnings.jsonl", self._own_lines)
        self.file.append(self.early)
        self.early = b""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:  # arguments that do not fit their text
            return self.handleError(record)
        entry = {"time": record.created, "rank": self.rank, "text": text}
        line = json.dumps(entry).encode() + b"\n"
        if self.file is None:
            self.early += line
        else:
            self.file.append(line)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        super().close()

    def _own_lines(self, before: bytes, now: bytes) -> bytes:
        """Returns the lines of this rank that are missing now; each rank restores its own."""
        there = set(now.splitlines())
        mine = b'"rank": %d,' % self.rank
        return b"".join(line for line in before.splitlines(keepends=True) if mine in line and line[:-1] not in there)
