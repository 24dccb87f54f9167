"""MMLU's questions from each place they can be in: the CSV files of the original release, a snapshot of the hub's
`cais/mmlu` on this disk, or that dataset by its name. All give the same rows.
"""

import csv
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download

from paths import readable
from text.sources import network_forbidden

LETTERS = ("A", "B", "C", "D")
HUB_NAME = "cais/mmlu"
N_SUBJECTS = 57
EVERYTHING = "all"  # the configuration of the dataset that has the rows of every subject


@dataclass(frozen=True)
class Example:
    """Holds one row, exactly as it stands in its file."""

    question: str
    choices: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Subject:
    """Holds one subject's rows, in the order of their files."""

    name: str
    dev: list[Example]
    test: list[Example]


ReadSplit = Callable[[str, str], list[Example]]  # of a subject and a split


def load_mmlu(
    mmlu_dir: str | None,
    subjects: Sequence[str] | None = None,
    local_files_only: bool = False,
    flag: str = "--mmlu_dir",
) -> list[Subject]:
    """Returns all subjects, or those asked for, from a folder in either layout; without a folder from the hub or its
    cache. Raises ValueError, which names the folder by `flag`.
    """
    available, read = _open(mmlu_dir, local_files_only, flag)
    wanted = list(dict.fromkeys(subjects)) if subjects is not None else available
    if unknown := [name for name in wanted if name not in available]:
        raise ValueError("; ".join(_unknown_subject(name, available) for name in unknown))
    found = [Subject(name, read(name, "dev"), read(name, "test")) for name in wanted]
    if not found or (empty := [subject.name for subject in found if not subject.test]):
        which = ", ".join(map(repr, empty)) if found else "its split `test`"
        raise ValueError(f"{flag} {mmlu_dir or HUB_NAME}: {which} has no question; copy it again, or leave it out")
    return found


def _open(mmlu_dir: str | None, local_files_only: bool, flag: str) -> tuple[list[str], ReadSplit]:
    """Returns the sorted names of the subjects there are, and the function that reads their rows."""
    if mmlu_dir is None:
        return _open_hub(local_files_only, flag)
    root = Path(mmlu_dir)
    with readable(f"{flag} {root}", root):
        if root.is_dir():
            next(root.iterdir(), None)  # raises OSError if it cannot be listed: glob finds nothing then
        return _open_folder(root, flag)


def _open_folder(root: Path, flag: str) -> tuple[list[str], ReadSplit]:
    if list(root.glob("*/test-*.parquet")):
        return _open_snapshot(root, flag)
    return _open_csv_folder(root, flag)


def _unknown_subject(name: str, available: list[str]) -> str:
    near = difflib.get_close_matches(name, available, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(available)}"
    return f"--subjects {name}: no such subject; {hint}"


# The original release: dev/<subject>_dev.csv, test/<subject>_test.csv


def _open_csv_folder(root: Path, flag: str) -> tuple[list[str], ReadSplit]:
    found: dict[str, set[str]] = {}
    for split in ("dev", "test"):
        folder = root / split
        names = {path.name.removesuffix(f"_{split}.csv") for path in folder.glob(f"*_{split}.csv")}
        if not names:
            state = f"holds no *_{split}.csv" if folder.is_dir() else "is not a folder"
            raise ValueError(
                f"{flag} {root}: {folder} {state}; give a folder in MMLU's original layout "
                "(dev/<subject>_dev.csv and test/<subject>_test.csv) or a snapshot of cais/mmlu "
                "(<subject>/test-*.parquet)"
            )
        found[split] = names
    if unpaired := sorted(found["dev"] ^ found["test"]):
        raise ValueError(f"{flag} {root}: dev/ and test/ do not both have {', '.join(unpaired)}")
    return sorted(found["test"]), lambda name, split: _read_csv(root / split / f"{name}_{split}.csv")


def _read_csv(path: Path) -> list[Example]:
    rows = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for index, row in enumerate(csv.reader(file)):
                if len(row) != 6 or row[5] not in LETTERS:
                    raise ValueError(
                        f"{path}, row {index} (counted from 0): expected a question, four choices and a "
                        f"letter A to D, got {len(row)} fields, the last of them {row[-1:]}"
                    )
                rows.append(Example(question=row[0], choices=tuple(row[1:5]), answer=row[5]))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, row {len(rows)} (counted from 0) or later: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if not rows:
        raise ValueError(f"{path}: expected at least one row, the file is empty")
    return rows


# cais/mmlu: columns question, choices, answer (0 to 3), and subject where all are together


def _open_snapshot(root: Path, flag: str) -> tuple[list[str], ReadSplit]:
    """Opens a folder with a folder for each subject, or with `all/` alone; each has parquet files by split."""
    names = sorted({file.parent.name for file in root.glob("*/test-*.parquet")} - {EVERYTHING})
    if names:
        return names, lambda name, split: _examples(_read_parquet(root / name, split, flag), f"{flag}: {root / name}")
    splits = {split: _read_parquet(root / EVERYTHING, split, flag) for split in ("dev", "test")}
    return _by_subject(splits, f"{flag}: {root}")


def _read_parquet(folder: Path, split: str, flag: str) -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files or not files[0].stem.endswith(f"-of-{len(files):05d}"):
        what = f"{len(files)} file(s) {split}-*.parquet, not as many as their names say"
        raise ValueError(f"{flag}: {folder} has {what}; copy the whole snapshot of {HUB_NAME}")
    rows = []
    for file in files:
        try:
            rows += pq.read_table(file).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{flag}: {file} cannot be read ({error}); copy it again") from error
    return rows


def _open_hub(local_files_only: bool, flag: str) -> tuple[list[str], ReadSplit]:
    """Opens what `hf download` has put into the cache, or else what `datasets` finds there, or fetches."""
    try:
        snapshot = Path(snapshot_download(HUB_NAME, repo_type="dataset", local_files_only=True))
    except OSError:
        snapshot = None
    if snapshot is not None:  # perhaps only a part: a subject that was loaded by its name leaves a snapshot, too
        folders = {file.parent.name for file in snapshot.glob("*/test-*.parquet")}
        if EVERYTHING in folders or len(folders) == N_SUBJECTS:
            return _open_snapshot(snapshot, flag)
    try:
        with network_forbidden(local_files_only):
            splits = {
                split: list(datasets.load_dataset(HUB_NAME, EVERYTHING, split=split)) for split in ("dev", "test")
            }
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{flag}: not given, and {HUB_NAME} is neither in the local Hugging Face cache nor downloadable "
            f"({error}); give a folder, or run `hf download {HUB_NAME} --repo-type dataset` on a machine with network "
            "and copy its cache"
        ) from error
    return _by_subject(splits, f"{flag}: {HUB_NAME}")


def _by_subject(splits: dict[str, list[dict[str, Any]]], where: str) -> tuple[list[str], ReadSplit]:
    """Sorts the rows of each split by their column `subject`."""
    if any(not isinstance(row.get("subject"), str) for rows in splits.values() for row in rows):
        raise ValueError(f"{where}: expected a column `subject` with a name in every row; copy it again")
    names = sorted({row["subject"] for row in splits["test"]})
    return names, lambda name, split: _examples([row for row in splits[split] if row["subject"] == name], where)


def _examples(rows: list[dict[str, Any]], where: str) -> list[Example]:
    examples = []
    for index, row in enumerate(rows):
        match row:
            case {"question": str(question), "choices": [str(a), str(b), str(c), str(d)], "answer": int(answer)} if (
                0 <= answer <= 3
            ):
                examples.append(Example(question, (a, b, c, d), LETTERS[answer]))
            case _:
                raise ValueError(
                    f"{where}, row {index} (counted from 0): expected a question, four choices and an "
                    "answer 0 to 3; copy it again"
                )
    return examples
