"""MMLU in small, made here: in the layout of the original release, and as a snapshot of `cais/mmlu`."""

import csv
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

GEOGRAPHY = [
    ["  What is the capital of France?\n", "Lyon", " Paris ", "Nice, by the sea", "Lille", "B"],
    ['Who said\n"Here be dragons"?', "A sailor", "A king", "A map", "No one", "C"],
    ["Which is a river?", "Rhine", "Alps", "Ural, the hills", "Etna", "A"],
]
LOGIC = [
    ["Is p and not p ever true?", "Yes", "No", "Maybe", "Often", "B"],
    ["Two plus two?", "1", "2\r\n", "3", "4", "D"],
]


def write_mmlu(root: Path, files: dict[str, list[list[str]]]) -> Path:
    """Writes CSV files; `files` names each without its ending, as in {"dev/logic_dev": rows}."""
    for name, rows in files.items():
        path = root / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
    return root


def write_snapshot(root: Path, subjects: list) -> Path:
    """Writes subjects as in a snapshot of `cais/mmlu`: a folder each, and the card by which `datasets` finds them."""
    card = ["---", "configs:"]
    for subject in subjects:
        card += [f"- config_name: {subject.name}", "  data_files:"]
        for split, rows in {"dev": subject.dev, "test": subject.test}.items():
            card += [f"  - split: {split}", f"    path: {subject.name}/{split}-*"]
            write_parquet(root / subject.name / f"{split}-00000-of-00001.parquet", subject.name, rows)
    (root / "README.md").write_text("\n".join([*card, "---", ""]))
    return root


def write_parquet(path: Path, subject: str, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "question": [row.question for row in rows],
        "subject": [subject] * len(rows),
        "choices": [list(row.choices) for row in rows],
        "answer": ["ABCD".index(row.answer) for row in rows],
    }
    pq.write_table(pa.table(columns), path)
