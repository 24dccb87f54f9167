"""What a check of `make gpu-check` has found, in the words of the doctor, and the time that the checks have."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from preflight.checks.basics import Finding

if TYPE_CHECKING:
    from pathlib import Path

    from preflight.gpu_check.facts import Facts

NOT_APPLICABLE, LEFT_OUT = "n/a", "left out"  # beside ok, warning and failure
NO_GPU_HERE = "not applicable: no GPU"
LEAST_SECONDS = 10.0  # a check that has less is not started


@dataclasses.dataclass(frozen=True)
class Result(Finding):
    """A finding with more lines. lines: what explains it, such as the end of a log. figures: Markdown for
    benchmarks/RESULTS.md.
    """

    lines: list[str] = dataclasses.field(default_factory=list)
    figures: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def left_out(cls, name: str, part: str) -> Result:
        remedy = f"make gpu-check PARTS={part}   gives this part more time"
        return cls(LEFT_OUT, name, "not started: the time of this part was used up", remedy)


@dataclasses.dataclass(frozen=True)
class Session:
    """Holds what the checks of a part need. work: a folder for logs and runs. ends: by time.monotonic()."""

    facts: Facts
    work: Path
    ends: float

    @property
    def n_gpus(self) -> int:
        return len(self.facts.gpus)

    @property
    def seconds_left(self) -> float:
        return self.ends - time.monotonic()

    @property
    def is_late(self) -> bool:
        return self.seconds_left < LEAST_SECONDS


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
