"""Rows of a dataset to texts: is the column text, what does each row hold, and what became of those without text."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import datasets

from text.decoding import BadRow
from text.row_limit import is_too_long, too_long
from text.sources import TextSource

logger = logging.getLogger("train")

ROWS_AT_ONCE = 256
BAD_ROWS_NAMED = 5  # in the log
TEXT_TYPES = [datasets.Value(name) for name in ("string", "large_string", "null")]


def check_text_field(columns: Mapping[str, object], source: TextSource) -> None:
    """Raises ValueError if `columns`, names mapped to feature types of `datasets`, lack the source's column of text."""
    field, what = source.text_field, f"{source.flags.text_field} {source.text_field!r}"
    if field not in columns:
        raise ValueError(f"{what}: no such column; available: {', '.join(columns)}")
    # A column of mixed types may still hold text: its rows are looked at one by one.
    if not isinstance(columns[field], datasets.Json) and columns[field] not in TEXT_TYPES:
        raise ValueError(f"{what}: the column holds {columns[field]}, expected text")


def rows_of(
    data: datasets.Dataset | datasets.IterableDataset,
    field: str,
    explain: Callable[[Exception], Exception] | None = None,
) -> Iterator[object]:
    """Yields what each row holds in column `field`. `explain` turns an error of reading into the one that is raised."""
    batches = data.iter(batch_size=ROWS_AT_ONCE)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            if explain is None:
                raise
            raise explain(error) from error
        if batch is None:
            return
        yield from batch[field]


@dataclass
class RowCounts:
    """Counts what became of the rows read so far."""

    seen: int = 0
    empty: int = 0
    bad: int = 0
    first_bad: list[str] = dataclasses.field(default_factory=list)  # where and why, of the first few

    def copy(self) -> "RowCounts":
        return RowCounts(self.seen, self.empty, self.bad, list(self.first_bad))

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: dict) -> "RowCounts":
        return cls(**stored).copy()  # counting on must not change what is stored

    def add_bad(self, where: str, rows: int = 1) -> None:
        self.bad += rows
        if len(self.first_bad) < BAD_ROWS_NAMED:
            self.first_bad.append(where)

    def log(self, field: str) -> None:
        if self.empty:
            logger.warning("skipped %d of %d rows: no text in column %r", self.empty, self.seen, field)
        if self.bad:
            more = "; ..." if self.bad > len(self.first_bad) else ""
            named = "; ".join(self.first_bad) + more
            logger.warning("--skip_bad_rows: skipped %d of %d rows: %s", self.bad, self.seen, named)


def only_texts(rows: Iterable[object], source: TextSource, counts: RowCounts | None = None) -> Iterator[str]:
    """Yields the rows that hold text. Empty ones are skipped and counted. A row that is no text raises ValueError, or
    is skipped and counted too if the source's bad rows are. `counts` is added to, and logged at the end.
    """
    counts = RowCounts() if counts is None else counts
    for row in rows:
        counts.seen += row.rows if isinstance(row, BadRow) else 1
        if row is None or row == "":
            counts.empty += 1
        elif isinstance(row, str) and not is_too_long(row):
            yield row
        elif isinstance(row, BadRow):  # comes from our own reader alone, which reads only if bad rows are skipped
            counts.add_bad(str(row), row.rows)
        elif source.skip_bad_rows:
            counts.add_bad(f"row {counts.seen - 1} as read here: {_shown(row)}")
        else:
            raise _no_text(row, counts.seen - 1, source)
    counts.log(source.text_field)


def _no_text(row: object, index: int, source: TextSource) -> ValueError:
    flags, remedy = source.flags, "correct that row or name another column"
    if flags.skip_bad_rows:
        remedy = f"correct that row, name another column, or leave such rows out with {flags.skip_bad_rows}"
    return ValueError(
        f"{flags.text_field} {source.text_field!r}: row {index} as read here holds {_shown(row)}, "
        f"expected text; {remedy}"
    )


def _shown(row: object) -> str:
    return f"text {too_long()}" if isinstance(row, str) else f"{type(row).__name__} ({row!r:.60})"
