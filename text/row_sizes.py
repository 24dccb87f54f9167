"""Looks for a row that is too long in compressed files that expand much, before `datasets` reads them: it puts no bound
on a row. Only the lengths are looked at, so that other faults hide nothing, and it takes little time.
"""

import logging
import os
import time
from pathlib import Path

from text import row_limit
from text.csv_reader import csv_place_of_too_long
from text.decoding import DAMAGED_ARCHIVE, BadRow, open_text
from text.expansion import most_expanded
from text.files import reader_of
from text.row_limit import bounded_lines, too_long

logger = logging.getLogger("train")

EXPANDS_MUCH = 32  # times; text expands 3 to 10 times
LONG_S = 5.0


def may_hold_too_long_a_row(file: str) -> bool:
    """Returns whether a file should be looked into before it is read: a compressed one that may expand much."""
    return most_expanded(file) > max(EXPANDS_MUCH * os.path.getsize(file), row_limit.LARGEST_ROW)


def first_row_too_long(files: list[str]) -> BadRow | None:
    """Returns the first row of the files that is too long, if there is one. A JSON list is read at once, like a row."""
    began, is_logged = time.monotonic(), False
    files = list(filter(may_hold_too_long_a_row, files))
    for i, file in enumerate(files):
        if not is_logged and time.monotonic() - began >= LONG_S:
            is_logged = True
            logger.info("looking for rows that are too long: %d of %d compressed files are done", i, len(files))
        if place := _place_of_too_long(file):
            return BadRow(file, place, too_long())
    return None


def _place_of_too_long(file: str) -> str | None:
    reader = reader_of(Path(file))
    try:
        if reader == "csv":
            return csv_place_of_too_long(file)
        return _place_of_document(file) if reader == "text" else _place_of_line(file)
    except DAMAGED_ARCHIVE:  # found again when it is read
        return None


def _place_of_line(file: str) -> str | None:
    size, is_list = 0, False
    with open_text(file, newline="\n") as opened:
        for number, line in enumerate(bounded_lines(opened), 1):
            if line is None:
                return f"line {number}"
            is_list = is_list or (number == 1 and line.startswith("["))
            size += len(line)
            if is_list and size > row_limit.LARGEST_ROW:
                return "the whole file"
    return None


def _place_of_document(file: str) -> str | None:
    first, size = 1, 0
    with open_text(file, newline=None) as opened:
        for number, line in enumerate(bounded_lines(opened), 1):
            if line == "\n" and size:
                first, size = number + 1, 0
                continue
            if line is None or (size := size + len(line)) > row_limit.LARGEST_ROW + 1:  # with the last line's end
                return f"line {first}"
    return None
