"""A split such as "train[:90%]+test" as rows. It is applied in one way, whatever kind of data it is a split of: by
absolute numbers of rows, with the rounding of `datasets`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import datasets

from text.sources import TextSource

NAME = re.compile(r"[^\[(]*")  # of a split, before its bounds


@dataclass(frozen=True)
class Part:
    """Holds the rows [first, end) of a split, counted from 0."""

    split: str
    first: int
    end: int
    is_whole: bool  # whether the split has no others

    def common(self, other: "Part") -> range:
        """Returns the rows that both have, if they are of the same data."""
        return range(max(self.first, other.first), min(self.end, other.end))


def split_names(source: TextSource, available: Iterable[str]) -> list[str]:
    """Returns the names in the source's split, such as `train` and `test` of "train[:1%]+test". `available` is empty
    where it is not known yet. Raises ValueError for a split that is not there, or is written in another way.
    """
    available, flag, split = list(available), source.flags.split, source.split
    if split == "all" and available:
        return available
    try:
        datasets.ReadInstruction.from_spec(split)
    except ValueError as error:
        raise ValueError(
            f'{flag} {split!r}: {error}; expected names of splits and whole numbers, as in "train[:90%]+test[100:]"'
        ) from error
    names = [NAME.match(term.strip()).group().strip() for term in split.split("+")]  # type: ignore[union-attr]
    if available and not set(names) <= set(available):
        raise ValueError(f"{flag} {split!r}: no such split; available: {', '.join(available)}")
    return list(dict.fromkeys(names))


def parts_of(source: TextSource, n_rows: Mapping[str, int]) -> list[Part]:
    """Returns the rows of the source's split, in its order. n_rows: of each split that there is. Raises ValueError as
    `split_names` does, and for bounds that make no part.
    """
    names = split_names(source, n_rows)
    spec = "+".join(names) if source.split == "all" else source.split
    try:
        bounds = datasets.ReadInstruction.from_spec(spec).to_absolute(n_rows)
    except ValueError as error:
        raise ValueError(f"{source.flags.split} {source.split!r}: {error}") from error
    return [
        Part(of.splitname, of.from_, max(of.from_, of.to), of.from_ == 0 and of.to == n_rows[of.splitname])
        for of in bounds
    ]


def take_split(
    n_rows: Mapping[str, int], table_of: Callable[[str], datasets.Dataset], source: TextSource
) -> datasets.Dataset:
    """Returns the rows of the source's split. Nothing is copied: a part looks into the table of the whole split, which
    `table_of` gives for its name. Raises ValueError for a split that is not there, or has no rows.
    """
    pieces = []
    for part in parts_of(source, n_rows):
        if part.end > part.first:
            table = table_of(part.split)
            # A whole one keeps its fingerprint, by which its packed tokens are found.
            pieces.append(table if part.is_whole else table.select(range(part.first, part.end)))
    if not pieces:
        raise no_rows(source)
    return pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)


def no_rows(source: TextSource) -> ValueError:
    """Returns what to raise for data without rows."""
    return ValueError(f"{source.flags.name} {source.name!r}: split {source.split!r} has no rows")
