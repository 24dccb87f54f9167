"""A reader of local text files that names each row it cannot read, and continues after it.

`datasets` reads good data faster, but stops at a fault and seldom says where it is. This reader finds the place for the
error message (`first_bad_row`), and reads everything itself under `--skip_bad_rows` (`tolerant_stream`).
"""

import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from text.csv_reader import csv_columns, csv_rows
from text.decoding import DAMAGED_ARCHIVE, BadRow, damaged_archive, not_one_column, not_utf8, open_text
from text.files import Stamp, reader_of
from text.row_limit import BoundedText, bounded_lines, is_too_long, too_long

BATCH_ROWS = 1024  # of a parquet file at a time
ROWS_LOOKED_AT = 100  # to find the columns of a JSON file
WHOLE_FILE = "the whole file"
CHANGED = "changed while it was read, so rows may be cut off, missing or new"


def is_readable_here(file: str) -> bool:
    """Returns whether `file` is on this disk, and of a kind that this reader knows."""
    return os.path.isfile(file) and reader_of(Path(file)) is not None


def rows_of_file(file: str, field: str | None) -> Iterator[object]:
    """Returns what each row holds in column `field`, or a BadRow for it. Without `field`, all columns are searched for
    faults. Raises OSError if the disk fails.
    """
    return ROWS[str(reader_of(Path(file)))](file, field)


def first_bad_row(files: list[str]) -> BadRow | None:
    """Returns the first row of the files that cannot be read, if there is one."""
    rows = (row for file in files for row in rows_of_file(file, None))
    return next((row for row in rows if isinstance(row, BadRow)), None)


def tolerant_stream(files: list[str], field: str) -> datasets.IterableDataset:
    """Returns a stream with one shard per file, with a BadRow in the place of each bad row, to be counted and named."""
    return datasets.IterableDataset.from_generator(_rows_of_files, gen_kwargs={"files": files, "field": field})


def _rows_of_files(files: list[str], field: str) -> Iterator[dict[str, object]]:
    for file in files:
        before = Stamp.of(file)
        for row in rows_of_file(file, field):
            yield {field: row}
        if Stamp.of(file) != before:
            yield {field: BadRow(file, WHOLE_FILE, CHANGED)}


def columns_of(files: list[str]) -> list[str]:
    """Returns the columns of the first file that has any that can be read."""
    found = (COLUMNS[str(reader_of(Path(file)))](file) for file in files)
    return next((columns for columns in found if columns), [])


# ---- JSON: an object a line, or one list of objects or of texts


def _json_rows(file: str, field: str | None) -> Iterator[object]:
    for row in _json_objects(file):
        if isinstance(row, BadRow):
            yield row
            continue
        place, fields = row
        value = fields if field is None else fields.get(field)
        if isinstance(value, str) and is_too_long(value):  # of a list, which is read at once
            yield BadRow(file, place, too_long())
        else:
            yield value if _is_unicode(value) else BadRow(file, place, "half a surrogate pair (\\ud800 to \\udfff)")


def _json_columns(file: str) -> list[str]:
    rows = (row[1] for row in _json_objects(file) if not isinstance(row, BadRow))
    return list(dict.fromkeys(name for row in islice(rows, ROWS_LOOKED_AT) for name in row))


def _json_objects(file: str) -> Iterator[tuple[str, dict] | BadRow]:
    number = 0
    try:
        if is_list(file):
            with open_text(file, newline="\n") as opened:
                yield from _elements(file, opened.read())
            return
        with open_text(file, newline="\n") as lines:
            for number, line in enumerate(bounded_lines(lines), 1):
                if line is None:
                    yield BadRow(file, f"line {number}", too_long())
                elif line.strip():
                    yield _parsed(file, f"line {number}", line)
    except DAMAGED_ARCHIVE as error:
        yield damaged_archive(file, number + 1, error)


def is_list(file: str) -> bool:
    """Returns whether a JSON file is one list, instead of an object a line."""
    with open_text(file, newline="\n") as opened:
        return opened.read(1) == "["


def _elements(file: str, text: str) -> Iterator[tuple[str, dict] | BadRow]:
    try:
        text.encode()
        elements = json.loads(text)
    except (ValueError, RecursionError) as error:
        yield _unparsed(file, WHOLE_FILE, error)
        return
    for number, element in enumerate(elements, 1):
        yield _object(file, f"element {number}", {"text": element} if isinstance(element, str) else element)


def _parsed(file: str, place: str, line: str) -> tuple[str, dict] | BadRow:
    try:
        line.encode()
        return _object(file, place, json.loads(line.rstrip()))
    except (ValueError, RecursionError) as error:
        return _unparsed(file, place, error)


def _object(file: str, place: str, value: object) -> tuple[str, dict] | BadRow:
    if isinstance(value, dict):
        return place, value
    return BadRow(file, place, f"a JSON {type(value).__name__} ({value!r:.60}), expected an object")


def _unparsed(file: str, place: str, error: Exception) -> BadRow:
    if isinstance(error, UnicodeEncodeError):
        return BadRow(file, place, not_utf8(error))
    if isinstance(error, json.JSONDecodeError):
        where = f"line {error.lineno} column {error.colno}" if place == WHOLE_FILE else f"column {error.colno}"
        return BadRow(file, place, f"JSON parse error: {error.msg.removesuffix(' at')} at {where}")
    return BadRow(file, place, f"JSON parse error: {error}")


def _is_unicode(value: object) -> bool:
    """Returns whether it can all be encoded: JSON can hold half a character (`\\ud800`), which no tokenizer takes."""
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value
    if isinstance(text, str) and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
    return True


# ---- plain text: documents between blank lines, as `datasets` splits them


def _text_rows(file: str, field: str | None) -> Iterator[object]:
    number, first, lines = 0, 1, BoundedText()
    try:
        with open_text(file, newline=None) as opened:
            for number, line in enumerate(bounded_lines(opened), 1):
                if line == "\n" and lines.size:
                    if row := _document(file, first, lines.text(end=-1)):  # without the last line's end
                        yield row
                    first, lines = number + 1, BoundedText()
                else:
                    lines.add(line)
        if row := _document(file, first, lines.text()):
            yield row
    except DAMAGED_ARCHIVE as error:
        yield damaged_archive(file, number + 1, error)


def _document(file: str, first: int, text: str | None) -> str | BadRow:
    if text is None:
        return BadRow(file, f"line {first}", too_long())
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line = first + text.count("\n", 0, error.start)
        return BadRow(file, f"line {line}", not_utf8(error))
    return text


# ---- parquet


def _parquet_rows(file: str, field: str | None) -> Iterator[object]:
    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        yield BadRow(file, WHOLE_FILE, _damaged_parquet(error))
        return
    with parquet:
        if field is not None and (n := parquet.schema_arrow.names.count(field)) != 1:
            yield BadRow(file, WHOLE_FILE, not_one_column(n, field))
            return
        first = 1
        for group in range(parquet.num_row_groups):
            yield from _rows_of_group(parquet, file, field, group, first)
            first += parquet.metadata.row_group(group).num_rows


def _rows_of_group(parquet: pq.ParquetFile, file: str, field: str | None, group: int, first: int) -> Iterator[object]:
    n_rows, done = parquet.metadata.row_group(group).num_rows, 0
    columns = None if field is None else [field]
    try:
        for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
            for column in batch.columns:
                for i, value in enumerate(_values(column), first + done):
                    is_text = not isinstance(value, UnicodeDecodeError)
                    yield value if is_text else BadRow(file, _place(group, i), f"not valid UTF-8 ({value})")
            done += len(batch)
    except (pa.ArrowException, OSError) as error:
        place = f"{_place(group, first + done)} to {first + n_rows - 1}"
        yield BadRow(file, place, _damaged_parquet(error), n_rows - done)


def _place(group: int, row: int) -> str:
    return f"row group {group} (from 0), row {row} (from 1)"


def _values(column: pa.Array) -> list[object]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # of one of them; arrow does not check what it reads
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _damaged_parquet(error: Exception) -> str:
    """Returns why a file, or a part of it, is damaged. Arrow raises an OSError without a number for that, too. One with
    a number comes from the disk or from permissions; it says nothing about the file, and is raised again.
    """
    if isinstance(error, OSError) and error.errno is not None:
        raise error
    return f"damaged parquet: {' '.join(str(error).split())}"


def _parquet_columns(file: str) -> list[str]:
    try:
        return pq.read_schema(file).names
    except (pa.ArrowException, OSError) as error:
        _damaged_parquet(error)  # raises what is no fault of the file
        return []


# ---- what reads which files, by the names of FILE_READERS

ROWS: dict[str, Callable[[str, str | None], Iterator[object]]] = {
    "json": _json_rows,
    "csv": csv_rows,
    "text": _text_rows,
    "parquet": _parquet_rows,
}
COLUMNS: dict[str, Callable[[str], list[str]]] = {
    "json": _json_columns,
    "csv": csv_columns,
    "text": lambda _: ["text"],
    "parquet": _parquet_columns,
}
