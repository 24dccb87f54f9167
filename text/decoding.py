"""Opens files of text, compressed or not, so that damage is found in the row that it is in: a `BadRow` takes the place
of a row that cannot be read.
"""

import gzip
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from text.files import compression

try:
    import zstandard
except ImportError:  # then `check_unpacking` refuses what needs it
    zstandard = None  # type: ignore[assignment]

DAMAGED_ARCHIVE: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
if zstandard is not None:
    DAMAGED_ARCHIVE += (zstandard.ZstdError,)


@dataclass(frozen=True)
class BadRow:
    """Takes the place of a row that cannot be read, or of several that are lost together."""

    file: str
    place: str
    reason: str
    rows: int = 1

    def __str__(self) -> str:
        return f"{self.file}, {self.place}: {self.reason}"


def open_text(file: str, newline: str | None) -> TextIO:
    """Opens a file so that bytes that are not UTF-8 become lone surrogates, which are found in their row."""
    match compression(Path(file)):
        case ".gz":
            return gzip.open(file, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline)
        case ".zst":
            packed = open(file, "rb")  # noqa: SIM115 closed with what is returned
            reader = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
            buffer = io.BufferedReader(reader)
            return io.TextIOWrapper(buffer, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
        case _:
            return open(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def not_utf8(error: UnicodeEncodeError) -> str:
    """Returns what is wrong with a text that cannot be encoded again, because its bytes were not UTF-8."""
    byte = ord(error.object[error.start]) - 0xDC00  # as surrogateescape has it
    return f"not valid UTF-8 (byte 0x{byte:02x}, {error.start} characters in)"


def damaged_archive(file: str, line: int, error: Exception) -> BadRow:
    """Returns what stands for all rows from `line` on of a compressed file."""
    return BadRow(file, f"line {line}", f"the compressed file is damaged, nothing from here on can be read ({error})")


def not_one_column(n: int, field: str) -> str:
    """Returns why a file is not read in which `n` columns, none or several, have the name of the column of text."""
    return f"{n} columns {field!r}" if n else f"no column {field!r}"
