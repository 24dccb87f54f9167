"""Rows of a dataset to texts: is the column text, what does each row hold, and what became of those without text."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import datasets

from text.tolerant_reader import BadRow

logger = logging.getLogger("train")

ROWS_AT_ONCE = 256
BAD_ROWS_NAMED = 5  # in the log
TEXT_TYPES = [datasets.Value(name) for name in ("string", "large_string", "null")]


def check_text_field(columns: Mapping[str, object], field: str) -> None:
    """`columns` maps names to `datasets` feature types."""
    if field not in columns:
        raise ValueError(f"--dataset_text_field {field!r}: no such column; available: {', '.join(columns)}")
    # a column of mixed types may hold text all the same: its rows are looked at one by one
    if not isinstance(columns[field], datasets.Json) and columns[field] not in TEXT_TYPES:
        raise ValueError(f"--dataset_text_field {field!r}: the column holds {columns[field]}, expected text")


def rows_of(
    data: datasets.Dataset | datasets.IterableDataset,
    field: str,
    explain: Callable[[Exception], Exception] | None = None,
) -> Iterator[object]:
    """`explain` makes of an error of reading the one that is raised, which names the place."""
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
    """What became of the rows read so far."""

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
        return cls(**stored).copy()  # what is stored stays as it is

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


def only_texts(
    rows: Iterable[object], field: str, skip_bad_rows: bool = False, counts: RowCounts | None = None
) -> Iterator[str]:
    """The rows that hold text. Empty ones are skipped and counted; what is no text is an error, or with
    `skip_bad_rows` skipped and counted too. `counts` go on from where they are, and are logged at the end.
    """
    counts = RowCounts() if counts is None else counts
    for row in rows:
        counts.seen += row.rows if isinstance(row, BadRow) else 1
        if row is None or row == "":
            counts.empty += 1
        elif isinstance(row, str):
            yield row
        elif isinstance(row, BadRow):  # only our own reader has them, and it reads under --skip_bad_rows alone
            counts.add_bad(str(row), row.rows)
        elif skip_bad_rows:
            counts.add_bad(f"row {counts.seen - 1} as read here: {type(row).__name__} ({row!r:.60})")
        else:
            raise ValueError(
                f"--dataset_text_field {field!r}: row {counts.seen - 1} as read here holds {type(row).__name__} "
                f"({row!r:.60}), expected text; correct that row, name another column, or leave such rows out with "
                "--skip_bad_rows"
            )
    counts.log(field)
