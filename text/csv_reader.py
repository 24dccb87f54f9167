"""Rows of CSV and TSV files, by Python's csv module, in which every field is text.

`datasets` reads such files with pandas, which makes missing values of `NA` and `null`, and numbers of `007`. It also
takes the first column for an index if rows have one field more than the header, and so reads a text as another column.
Here such a row is a BadRow, and so is one with text behind a closing quotation mark: pandas joins the rows up to it.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from text import row_limit
from text.decoding import DAMAGED_ARCHIVE, BadRow, damaged_archive, not_one_column, not_utf8, open_text
from text.files import file_ending
from text.row_limit import bounded_lines, too_long


def csv_columns(file: str) -> list[str]:
    """Returns the names in the first row, or none if it cannot be read."""
    header = _header(file, _records(file))
    return header if isinstance(header, list) else []


def csv_rows(file: str, field: str | None) -> Iterator[object]:
    """Returns what each row holds in column `field`, or a BadRow for it. Without `field`, all columns are searched for
    faults. A row that ends before the column holds an empty text.
    """
    records = _records(file)
    columns = _header(file, records)
    if not isinstance(columns, list):
        yield from () if columns is None else (columns,)
        return
    if field is not None and (n := columns.count(field)) != 1:
        yield BadRow(file, "the whole file", not_one_column(n, field))
        return
    for record in records:
        yield record if isinstance(record, BadRow) else _value(file, *record, columns, field)


def csv_place_of_too_long(file: str) -> str | None:
    """Returns where the first row begins that is too long, if there is one."""
    places = (row.place for row in _records(file) if isinstance(row, BadRow) and row.reason.startswith(too_long()))
    return next(places, None)


def _header(file: str, records: Iterator[tuple[str, list[str]] | BadRow]) -> list[str] | BadRow | None:
    header = next(records, None)
    if header is None or isinstance(header, BadRow):
        return header
    place, columns = header
    found = _value(file, place, columns, columns, None)
    return found if isinstance(found, BadRow) else columns


def _value(file: str, place: str, row: list[str], columns: list[str], field: str | None) -> object:
    if len(row) > len(columns):
        return BadRow(
            file,
            place,
            f"{len(row)} fields, expected {len(columns)} (a comma without quotation marks?)",
        )
    row += [""] * (len(columns) - len(row))
    for text in row if field is None else [row[columns.index(field)]]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return BadRow(file, place, not_utf8(error))
    return row if field is None else row[columns.index(field)]


def _records(file: str) -> Iterator[tuple[str, list[str]] | BadRow]:
    """Yields the fields of each row, the header's too, with the line that it begins at."""
    csv.field_size_limit(sys.maxsize)  # of the whole process; 131072 by default, which a document may well have
    lines = None
    try:
        with open_text(file, newline="") as opened:
            lines = _Lines(opened, delimiter := "\t" if file_ending(Path(file)) == ".tsv" else ",")
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            while (row := _next(rows, lines, file)) is not None:
                yield row
    except RowTooLong:  # perhaps with a quotation mark in what was passed over
        yield BadRow(file, f"line {lines.first if lines else 1}", f"{too_long()}, and nothing from here on can be read")
    except DAMAGED_ARCHIVE as error:
        yield damaged_archive(file, lines.number + 1 if lines else 1, error)


class RowTooLong(Exception):
    """Says that a row is longer than the largest that is read."""


class _Lines:
    """Hands lines to the csv module, without blank ones between rows, and knows where the present row begins. Raises
    RowTooLong.
    """

    def __init__(self, opened: TextIO, delimiter: str):
        self.lines, self.blanks = bounded_lines(opened), " \t\r\n".replace(delimiter, "")
        self.number = self.first = self.size = 0  # of lines read, of the row's first, and characters of the row
        self.begins, self.has_ended = True, False

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        for line in self.lines:
            self.number += 1
            if not self.begins or line is None or line.strip(self.blanks):
                self.first, self.size = (self.number, 0) if self.begins else (self.first, self.size)
                self.size += 0 if line is None else len(line)
                if line is None or self.size > row_limit.LARGEST_ROW:
                    raise RowTooLong
                self.begins = False
                return line
        self.has_ended = True
        raise StopIteration


def _next(rows: Iterator[list[str]], lines: _Lines, file: str) -> tuple[str, list[str]] | BadRow | None:
    """Returns the next row. Behind a BadRow reading continues in the line behind the one where it was noticed."""
    lines.begins = True
    try:
        row = next(rows, None)
    except csv.Error as error:
        if lines.has_ended:  # the csv module asked for more lines
            reason = "a quotation mark is not closed, nothing from here on can be read"
            return BadRow(file, f"line {lines.first}", reason)
        lost = f" in line {lines.number}, nothing in between can be read" if lines.number > lines.first else ""
        return BadRow(file, f"line {lines.first}", f"CSV: {error}{lost}")
    return None if row is None else (f"line {lines.first}", row)
