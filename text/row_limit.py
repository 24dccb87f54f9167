"""The largest row that is read. Reading a row takes up to seven times its size: a line of gigabytes, or a small `.gz`
that expands to one, would fill the host's memory. It is a row that cannot be read instead.
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from text.files import compression

# Characters: a hundred million tokens, and some 4 GB while `datasets` reads it. Arrow itself ends at 2 GiB.
LARGEST_ROW = 1 << 29
SMALL_FILE = 1 << 24  # bytes; a compressed file of which all can be looked into before it is read
EXPANDS_MUCH = 32  # times; text expands 3 to 10 times


def is_too_long(row: str) -> bool:
    """Returns whether a row is longer than the largest that is read."""
    return len(row) > LARGEST_ROW


def too_long() -> str:
    """Returns why such a row is not read."""
    return f"longer than {LARGEST_ROW} characters, the largest row that is read"


def bounded_lines(file: TextIO) -> Iterator[str | None]:
    """Yields the lines of a file, each with its end, and None for one that is too long, which is passed over."""
    while line := file.readline(LARGEST_ROW + 1):
        if len(line) <= LARGEST_ROW:
            yield line
            continue
        while line and not line.endswith("\n"):
            line = file.readline(1 << 20)
        yield None


class BoundedText:
    """Gathers lines, None for one that was passed over, and holds no more of them than the largest row has."""

    def __init__(self) -> None:
        self.size, self._held = 0, io.StringIO()

    def add(self, line: str | None) -> None:
        self.size += LARGEST_ROW + 1 if line is None else len(line)
        if line is not None and self.size <= LARGEST_ROW:
            self._held.write(line)

    def text(self, end: int | None = None) -> str | None:
        """Returns what was gathered, up to `end`, or None if it is too long."""
        return None if self.size > LARGEST_ROW else self._held.getvalue()[:end]


def may_hold_too_long_a_row(file: str) -> bool:
    """Returns whether a compressed file should be looked into before `datasets` reads it, which puts no bound on a row.
    The last four bytes of a `.gz` say to what size it expands, or its last part does, modulo 4 GiB.
    """
    if not (kind := compression(Path(file))) or (size := os.path.getsize(file)) < 4:
        return False
    if kind != ".gz":
        return size <= SMALL_FILE
    with open(file, "rb") as compressed:
        compressed.seek(-4, os.SEEK_END)
        expanded = int.from_bytes(compressed.read(), "little")
    # Several parts, or more than 4 GiB. Each of a large file's would be too many.
    is_unknown = expanded < size <= SMALL_FILE
    return is_unknown or expanded > max(EXPANDS_MUCH * size, LARGEST_ROW)
