"""The largest row that is read. Reading a row takes up to seven times its size: a line of gigabytes, or a small `.gz`
that expands to one, would fill the host's memory. It is a row that cannot be read instead.
"""

import io
from collections.abc import Iterator
from typing import TextIO

# Characters: a hundred million tokens, and some 4 GB while `datasets` reads it. Arrow itself ends at 2 GiB.
LARGEST_ROW = 1 << 29


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
