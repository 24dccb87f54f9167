"""Reads what `save_to_disk` of the `datasets` library has written: the folder of a Dataset, or of a DatasetDict with a
folder for each split. `datasets` says of damage what went wrong, but not in which file; here the file is named.
"""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from text.sources import TextSource
from text.splits import split_names

DICT_FILE = "dataset_dict.json"
STATE_FILE = "state.json"
INFO_FILE = "dataset_info.json"
ONLY_SPLIT = "train"  # of a Dataset that does not know which it is
END = b"\xff\xff\xff\xff\0\0\0\0"  # of every arrow file that was written to its end


def is_saved(folder: Path) -> bool:
    """Returns whether `save_to_disk` has written the folder."""
    return any((folder / name).exists() for name in (DICT_FILE, STATE_FILE))


def open_saved(folder: Path, source: TextSource) -> dict[str, datasets.Dataset]:
    """Returns the tables of the splits that the source names, whole, on the disk. Raises ValueError if one is not
    there or is damaged.
    """
    if (folder / DICT_FILE).exists():
        available = _field(folder / DICT_FILE, "splits", list, source)
        return {name: _open_table(folder / name, source)[1] for name in split_names(source, map(str, available))}
    split, table = _open_table(folder, source)
    split_names(source, [split])
    return {split: table}


def _open_table(folder: Path, source: TextSource) -> tuple[str, datasets.Dataset]:
    """Returns a table, and the split that it knows itself to be."""
    listed = _field(folder / STATE_FILE, "_data_files", list, source)
    files = [folder / str(file["filename"]) for file in listed if isinstance(file, dict) and "filename" in file]
    _json(folder / INFO_FILE, source)
    for file in files:
        if problem := _end_problem(file):
            raise _damaged(file, problem, source)
    try:
        table = datasets.Dataset.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        problems = ((file, problem) for file in files if (problem := _arrow_problem(file)))
        raise _damaged(*next(problems, (folder, f"{type(error).__name__}: {error}")), source) from error
    known = str(table.split or ONLY_SPLIT)  # may be a part itself, or a sum
    return (ONLY_SPLIT if "+" in known else known.split("[")[0]), table


def _end_problem(file: Path) -> str | None:
    """Returns what is wrong with the end of a table's file, or None. One that ends between two batches is read without
    an error, with fewer rows, but it lacks the mark of its end.
    """
    try:
        with open(file, "rb") as raw:
            raw.seek(-len(END), os.SEEK_END)
            return None if raw.read() == END else "cut off: the mark of its end is missing"
    except FileNotFoundError:
        return "no such file"
    except OSError as error:  # it is shorter than the mark, say
        return f"cut off, or cannot be read ({error.strerror})"


def _arrow_problem(file: Path) -> str | None:
    try:
        with pa.memory_map(str(file)) as opened:
            pa.ipc.open_stream(opened).read_all()
        return None
    except (OSError, pa.ArrowException) as error:
        return f"no arrow file, or a damaged one ({' '.join(str(error).split())})"


def _field(file: Path, key: str, kind: type, source: TextSource) -> Any:
    value = _json(file, source).get(key)
    if not isinstance(value, kind):
        raise _damaged(file, f"has no {kind.__name__} {key!r}", source)
    return value


def _json(file: Path, source: TextSource) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _damaged(file, "no such file", source) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, f"cannot be read as JSON ({error})", source) from error
    if not isinstance(found, dict):
        raise _damaged(file, f"holds a {type(found).__name__}, expected an object", source)
    return found


def _damaged(file: Path, problem: str, source: TextSource) -> ValueError:
    return ValueError(
        f"{source.flags.name} {source.name!r}: damaged, {file}: {problem}; copy the folder again, or write it again "
        "with save_to_disk"
    )
