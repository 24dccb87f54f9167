"""The file measured.jsonl of a choice: a row for each set of layers, or each ablation, that has been measured, named by
what it is. A choice that was stopped measures what is missing.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appended_file import AppendedFile
from selection.probes import Score
from selection.swaps import Figures
from utils import write_whole

logger = logging.getLogger("train")

FILE = "measured.jsonl"


class Measured:
    """Holds the rows by their names, and appends new ones to the file. path: None keeps them in memory alone."""

    def __init__(self, path: Path | None, shapes: Mapping[str, tuple[int, Mapping[str, int]]]) -> None:
        """shapes: what a name begins with -> how many windows its KL has, and how many texts each of its probes.

        Raises ValueError of one line that names a damaged row. A last line that was not written to its end is dropped.
        """
        self.shapes = shapes
        self.rows: dict[str, Figures] = {}
        self.file = None if path is None else AppendedFile(path)
        if path is not None and path.exists():
            for number, line in enumerate(self._lines(path), 1):
                self._read(path, number, line)

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def __getitem__(self, name: str) -> Figures:
        return self.rows[name]

    def put(self, name: str, figures: Figures) -> None:
        """Adds a row, and flushes it to the disk."""
        self.rows[name] = figures
        if self.file is not None:
            probes = {probe: score._asdict() for probe, score in figures.probes.items()}
            row = {"name": name, "kl": figures.kl, "probes": probes}
            self.file.append(json.dumps(row, allow_nan=False).encode() + b"\n")
            self.file.flush_to_disk()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    @staticmethod
    def _lines(path: Path) -> list[bytes]:
        try:
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                logger.warning("%s: its last row was not written to its end; it is measured again", path)
                write_whole(path, whole)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}); correct that, or move it away") from error
        return whole.splitlines()

    def _read(self, path: Path, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            figures = Figures(
                _numbers(row["kl"]),
                {name: Score(_numbers(score["loss"]), _numbers(score["acc"])) for name, score in row["probes"].items()},
            )
            self._check(row["name"], figures)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{path}: row {number} is damaged ({reason:.80}); delete that line, and it is measured again"
            ) from error
        self.rows[row["name"]] = figures

    def _check(self, name: str, figures: Figures) -> None:
        """Raises ValueError of a row that is shorter or longer than what it says it is."""
        n_windows, n_texts = self.shapes[name.split(" ")[0]]
        found = {probe: {len(score.loss), len(score.acc)} for probe, score in figures.probes.items()}
        if len(figures.kl) != n_windows or found != {probe: {n} for probe, n in n_texts.items()}:
            raise ValueError(f"it has {len(figures.kl)} windows and {found}, expected {n_windows} and {dict(n_texts)}")


def _numbers(values: Any) -> list[float]:
    if not isinstance(values, list) or any(isinstance(x, bool) or not isinstance(x, int | float) for x in values):
        raise TypeError("expected lists of numbers")
    if not all(map(math.isfinite, values)):
        raise ValueError("a number is not finite")
    return [float(x) for x in values]


def name_of(kind: str, parts: Sequence[int]) -> str:
    """Returns the name of a row: of a set of recurrent layers, or of a layer, or of a layer and a head."""
    return f"{kind} {','.join(map(str, sorted(parts) if kind != 'ablation' else parts))}"
