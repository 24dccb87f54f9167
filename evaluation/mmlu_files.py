"""MMLU's questions from wherever they are: the CSV files of the original release, a snapshot of the hub's `cais/mmlu`
on this disk, or that data set by its name. All give the same rows.
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

from text.sources import network_forbidden

LETTERS = ("A", "B", "C", "D")
HUB_NAME = "cais/mmlu"
N_SUBJECTS = 57
EVERYTHING = "all"  # the configuration of the data set that has the rows of every subject


@dataclass(frozen=True)
class Example:
    """One row, exactly as it stands in its file."""

    question: str
    choices: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Subject:
    name: str
    dev: list[Example]
    test: list[Example]


ReadSplit = Callable[[str, str], list[Example]]  # of subject and split


def load_mmlu(
    mmlu_dir: str | None, subjects: Sequence[str] | None = None, local_files_only: bool = False
) -> list[Subject]:
    """All subjects, or those asked for, from a folder in either layout; without a folder from the hub or its cache.
    Raises ValueError.
    """
    available, read = _open(mmlu_dir, local_files_only)
    wanted = list(dict.fromkeys(subjects)) if subjects is not None else available
    if unknown := [name for name in wanted if name not in available]:
        raise ValueError("; ".join(_unknown_subject(name, available) for name in unknown))
    return [Subject(name, read(name, "dev"), read(name, "test")) for name in wanted]


def _open(mmlu_dir: str | None, local_files_only: bool) -> tuple[list[str], ReadSplit]:
    """The names of the subjects there are, sorted, and the way to their rows."""
    if mmlu_dir is None:
        return _open_hub(local_files_only)
    root = Path(mmlu_dir)
    if list(root.glob("*/test-*.parquet")):
        return _open_snapshot(root)
    return _open_csv_folder(root)


def _unknown_subject(name: str, available: list[str]) -> str:
    near = difflib.get_close_matches(name, available, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(available)}"
    return f"--subjects {name}: no such subject; {hint}"


# The original release: dev/<subject>_dev.csv, test/<subject>_test.csv


def _open_csv_folder(root: Path) -> tuple[list[str], ReadSplit]:
    found: dict[str, set[str]] = {}
    for split in ("dev", "test"):
        folder = root / split
        names = {path.name.removesuffix(f"_{split}.csv") for path in folder.glob(f"*_{split}.csv")}
        if not names:
            state = f"holds no *_{split}.csv" if folder.is_dir() else "is not a folder"
            raise ValueError(
                f"--mmlu_dir {root}: {folder} {state}; give a folder in MMLU's original layout "
                "(dev/<subject>_dev.csv and test/<subject>_test.csv) or a snapshot of cais/mmlu "
                "(<subject>/test-*.parquet)"
            )
        found[split] = names
    if unpaired := sorted(found["dev"] ^ found["test"]):
        raise ValueError(f"--mmlu_dir {root}: dev/ and test/ do not both have {', '.join(unpaired)}")
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
    if not rows:
        raise ValueError(f"{path}: expected at least one row, the file is empty")
    return rows


# cais/mmlu: columns question, choices, answer (0 to 3), and subject where all are together


def _open_snapshot(root: Path) -> tuple[list[str], ReadSplit]:
    """A folder for each subject, or `all/` alone; each with parquet files by split."""
    names = sorted({file.parent.name for file in root.glob("*/test-*.parquet")} - {EVERYTHING})
    if names:
        return names, lambda name, split: _examples(_read_parquet(root / name, split), f"{root / name}")
    return _by_subject({split: _read_parquet(root / EVERYTHING, split) for split in ("dev", "test")}, str(root))


def _read_parquet(folder: Path, split: str) -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files or not files[0].stem.endswith(f"-of-{len(files):05d}"):
        what = f"{len(files)} file(s) {split}-*.parquet, not as many as their names say"
        raise ValueError(f"--mmlu_dir: {folder} has {what}; copy the whole snapshot of {HUB_NAME}")
    rows = []
    for file in files:
        try:
            rows += pq.read_table(file).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"--mmlu_dir: {file} cannot be read ({error}); copy it again") from error
    return rows


def _open_hub(local_files_only: bool) -> tuple[list[str], ReadSplit]:
    """What `hf download` has put into the cache; else what `datasets` finds there, or fetches."""
    try:
        snapshot = Path(snapshot_download(HUB_NAME, repo_type="dataset", local_files_only=True))
    except OSError:
        snapshot = None
    if snapshot is not None:  # not necessarily all of it: one subject that was loaded by its name leaves one, too
        folders = {file.parent.name for file in snapshot.glob("*/test-*.parquet")}
        if EVERYTHING in folders or len(folders) == N_SUBJECTS:
            return _open_snapshot(snapshot)
    try:
        with network_forbidden(local_files_only):
            splits = {
                split: list(datasets.load_dataset(HUB_NAME, EVERYTHING, split=split)) for split in ("dev", "test")
            }
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"--mmlu_dir: not given, and {HUB_NAME} is neither in the local Hugging Face cache nor to be had "
            f"({error}); give a folder, or run `hf download {HUB_NAME} --repo-type dataset` on a machine with network "
            "and copy its cache"
        ) from error
    return _by_subject(splits, HUB_NAME)


def _by_subject(splits: dict[str, list[dict[str, Any]]], where: str) -> tuple[list[str], ReadSplit]:
    if any(not isinstance(row.get("subject"), str) for rows in splits.values() for row in rows):
        raise ValueError(f"--mmlu_dir: {where}: expected a column `subject` with a name in every row; copy it again")
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
                    f"--mmlu_dir: {where}, row {index} (counted from 0): expected a question, four choices and an "
                    "answer 0 to 3; copy it again"
                )
    return examples
