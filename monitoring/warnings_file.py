"""warnings.jsonl: the warnings of all ranks, with their time, beside the log."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

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


class WarningsFile(logging.Handler):
    """Appends each warning to a file, and holds those that come before `write_to` has named it."""

    def __init__(self, rank: int) -> None:
        super().__init__(logging.WARNING)
        self.rank, self.early = rank, b""
        self.path: Path | None = None

    def write_to(self, folder: Path) -> None:
        self.path = folder / "warnings.jsonl"
        self._append(self.early)
        self.early = b""

    def emit(self, record: logging.LogRecord) -> None:
        entry = {"time": record.created, "rank": self.rank, "text": self.format(record)}
        line = json.dumps(entry).encode() + b"\n"
        if self.path is None:
            self.early += line
        else:
            self._append(line)

    def _append(self, lines: bytes) -> None:
        """Appends in one write, so that lines of several ranks do not mix."""
        assert self.path is not None
        if lines:
            with contextlib.suppress(OSError), self.path.open("ab", buffering=0) as file:  # the log has them, too
                file.write(lines)
