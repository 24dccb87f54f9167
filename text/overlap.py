"""Is held-out text trained on? `check_not_trained_on` compares rows, not the names that were given: two names may mean
the same file, through a link, inside a folder or as a copy, and two parts of a split may have rows in common.
"""

import filecmp
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import datasets

from text.opening import Whole, local_path, open_whole, prepare
from text.sources import TextSource, is_part, network_forbidden
from text.splits import Part, parts_of, split_names

END_BYTES = 64 * 1024
COMMIT = re.compile(r"@[0-9a-f]{40}(?=/)")  # in the address of a file of the hub
# Numbers of rows to try where they are not counted: parts that share rows in each of these do so, whatever there are.
ANY_NUMBER = (100, 10_000, 100_000_000)


class TrainedOn(ValueError):
    """Says that held-out text is trained on."""


@dataclass(frozen=True)
class Split:
    """Holds the files that a split is made of, or another name for all of it, and how many rows it has."""

    files: tuple[str, ...]
    n_rows: int | None  # None: not counted


def check_not_trained_on(held_out: TextSource, training: TextSource, who: str, *, may_count: bool = True) -> None:
    """Raises TrainedOn if rows of `held_out` are rows of `training`, and names them; another ValueError if one of them
    cannot be opened. who: trains on it, for the message. may_count: whether a table may be made, as reading a part of
    a split does, to count rows; if not, parts with rows in common are found only if they have some whatever the number
    is.
    """
    paths = local_path(held_out), local_path(training)
    if None in paths and (paths[0] != paths[1] or held_out.name != training.name):
        return  # a data set of the hub is no other one, and no local data
    sources = (held_out, training)
    with network_forbidden(held_out.local_files_only):
        opened = [open_whole(source) for source in sources]
        splits = [_splits_of(one, source) for one, source in zip(opened, sources, strict=True)]
        if paths[0] is not None and not any(_same_files(*pair) for pair in _pairs_of_files(splits).values()):
            return  # before tables are made: all of the training data may be large
        if may_count and all(is_part(source.split) for source in sources):
            for one, source in zip(opened, sources, strict=True):
                if isinstance(one, datasets.DatasetBuilder):
                    prepare(one, source)
            splits = [_splits_of(one, source) for one, source in zip(opened, sources, strict=True)]
    if shared := _shared_rows(sources, splits):
        flags, its = held_out.flags, training.flags
        raise TrainedOn(
            f"{flags.name} {held_out.name!r}, split {held_out.split!r}: {shared} trained on by {who} "
            f"({its.name} {training.name!r}, split {training.split!r}); give other text with {flags.name} FILE, or "
            f'keep a part from training, as {its.split} "train[:99%]" {flags.split} "train[99%:]" does'
        )


def _splits_of(opened: Whole, source: TextSource) -> dict[str, Split]:
    """Returns the splits that the source names."""
    if isinstance(opened, dict):
        tables = opened.items()
        return {name: Split(tuple(file["filename"] for file in data.cache_files), len(data)) for name, data in tables}
    counted = {str(name): info.num_examples or None for name, info in (opened.info.splits or {}).items()}
    files = {str(name): tuple(map(str, files)) for name, files in (opened.config.data_files or {}).items()}
    return {
        name: Split(files.get(name, (f"{opened.cache_dir}/{name}",)), counted.get(name))
        for name in split_names(source, files or counted)
    }


def _pairs_of_files(
    splits: Sequence[Mapping[str, Split]],
) -> dict[tuple[str, str], tuple[Sequence[str], Sequence[str]]]:
    """Returns the files of each split of the first source, and of each of the second, by their names."""
    return {(one, two): (splits[0][one].files, splits[1][two].files) for one, two in product(*splits)}


def _shared_rows(sources: Sequence[TextSource], splits: Sequence[Mapping[str, Split]]) -> str:
    """Returns the rows of the first source that the second has too, in words, or ""."""
    same = {names: _same_files(*files) for names, files in _pairs_of_files(splits).items()}
    are_counted = all(split.n_rows is not None for of_source in splits for split in of_source.values())
    words = ""
    for assumed in ANY_NUMBER[:1] if are_counted else ANY_NUMBER:
        counts = [{name: split.n_rows or assumed for name, split in of_source.items()} for of_source in splits]
        mine, theirs = (parts_of(source, n_rows) for source, n_rows in zip(sources, counts, strict=True))
        found = (
            _in_words(part, other, same[part.split, other.split], splits[0][part.split], splits[1][other.split])
            for part, other in product(mine, theirs)
        )
        words = next((text for text in found if text), "")
        if not words:
            return ""
    return words


def _in_words(part: Part, other: Part, same_files: list[str], split: Split, other_split: Split) -> str:
    """Returns what two parts of splits share, or ""."""
    if not same_files:
        return ""
    have_same_files = len(same_files) == len(split.files) == len(other_split.files)
    if have_same_files and other.is_whole:
        return "all of it is"
    if not (have_same_files and _are_in_order(split.files, other_split.files)):
        # Which rows of a file a part of several files holds is not known: any part counts.
        return f"{len(same_files)} file(s) of it, for example {same_files[0]}, are"
    rows = part.common(other)
    if split.n_rows is None:
        return "some of its rows are" if rows or part.is_whole else ""
    return f"its rows {rows[0]} to {rows[-1]} of split {part.split!r} (from 0) are" if rows else ""


def _same_files(files: Sequence[str], others: Sequence[str]) -> list[str]:
    """Returns those of `files` that are among `others`, through a link or as a copy too."""
    known = {_identity(file) for file in others}
    sizes = set(map(_size, files)) & set(map(_size, others)) - {None, 0}
    alike = defaultdict(list)
    for file in others:
        if _size(file) in sizes:
            alike[_ends(file)].append(file)

    def is_copy(file: str) -> bool:
        candidates = alike[_ends(file)] if _size(file) in sizes else []
        return any(filecmp.cmp(file, other, shallow=False) for other in candidates)

    return [file for file in files if _identity(file) in known or is_copy(file)]


def _ends(file: str) -> object:
    """Returns what all copies of a file have in common and few others: reading n files whole, n times, takes hours."""
    size = os.path.getsize(file)
    with open(file, "rb") as stream:
        hashed = hashlib.sha256(stream.read(END_BYTES))
        stream.seek(max(0, size - END_BYTES))
        hashed.update(stream.read())
    return size, hashed.digest()


def _are_in_order(files: Sequence[str], others: Sequence[str]) -> bool:
    return all(_same_files([file], [other]) for file, other in zip(files, others, strict=True))


def _identity(file: str) -> object:
    if _size(file) is None:
        return COMMIT.sub("", file)
    stat = os.stat(file)
    return stat.st_dev, stat.st_ino


def _size(file: str) -> int | None:
    """Returns the bytes of a local file, or None for any other."""
    return os.path.getsize(file) if os.path.isfile(file) else None
