"""The report of `make gpu-check`, written anew after every finding: whatever ends the check loses what was under way,
and nothing else. The findings are also kept as JSON, so that parts can be run one by one into the same report.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from typing import TYPE_CHECKING

from preflight.checks.basics import FAILURE, OK, WARNING, show
from preflight.gpu_check.facts import Facts
from preflight.gpu_check.results import LEFT_OUT, NOT_APPLICABLE, Result, table

if TYPE_CHECKING:
    from pathlib import Path

STATUSES = (OK, WARNING, FAILURE, LEFT_OUT, NOT_APPLICABLE)
NOTHING_RAN = (
    "**Nothing here ran on a GPU:** this machine has none. These are trials of the check itself, and no result."
)


@dataclasses.dataclass
class Section:
    """Holds what a part has found. state: `running`, or how it ended."""

    facts: Facts
    state: str = "running: if nothing is, it was ended from outside"
    results: list[Result] = dataclasses.field(default_factory=list)

    @classmethod
    def from_json(cls, values: dict) -> Section:
        return cls(Facts(**values["facts"]), values["state"], [Result(**result) for result in values["results"]])


class Report:
    """Collects the findings of parts, in the order of `order`; sections that the folder `work` has from earlier are
    kept until their parts run again.
    """

    def __init__(self, file: Path, work: Path, order: list[str]) -> None:
        self.file, self.kept, self.order = file, work / "findings.json", order
        self.sections: dict[str, Section] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # none, cut short, or an older version's
            found = json.loads(self.kept.read_text())
            self.sections = {part: Section.from_json(values) for part, values in found.items()}

    def begin(self, part: str, facts: Facts) -> None:
        print(f"\n{part}", flush=True)
        self.sections[part] = Section(facts)
        self.write()

    def add(self, part: str, result: Result) -> None:
        """Shows a finding as it comes, and writes it to the disk."""
        show(result)
        if result.status == FAILURE:
            print("".join(f"         | {line}\n" for line in result.lines), end="", flush=True)
        self.sections[part].results.append(result)
        self.write()

    def end(self, part: str, seconds: float) -> None:
        self.sections[part].state = f"ended after {seconds:.0f} s"
        self.write()

    def write(self) -> None:
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        self.kept.write_text(json.dumps({part: dataclasses.asdict(one) for part, one in self.sections.items()}))
        self.file.write_text("\n".join(self.lines()) + "\n")

    def lines(self) -> list[str]:
        """Returns the report: every finding by part, then what RESULTS.md takes."""
        parts = [part for part in self.order if part in self.sections]
        lines = ["# GPU check", "", "Made by `make gpu-check`. Each failure names the next thing to look at.", ""]
        if not any(self.sections[part].facts.gpus for part in parts):
            lines += [NOTHING_RAN, ""]
        for part in parts:
            section = self.sections[part]
            lines += [f"## {part}", "", f"{section.facts.date}, {section.facts.machine}; {section.state}.", ""]
            for result in section.results:
                lines += lines_of(result)
            lines.append("")
        return [*lines, "## For benchmarks/RESULTS.md", "", *self.block(parts)]

    def block(self, parts: list[str]) -> list[str]:
        """Returns Markdown with the machine, how many checks passed, and all figures."""
        on_gpus = [part for part in parts if self.sections[part].facts.gpus]
        if not on_gpus:
            return [NOTHING_RAN]
        facts = self.sections[on_gpus[-1]].facts
        kernels = f"Scan by {facts.scan}, convolution by {facts.convolution}, commit {facts.commit}."
        lines = [f"### `make gpu-check`, {facts.date}", "", f"{facts.machine}. {kernels}", ""]
        lines += table_of_counts({part: self.sections[part].results for part in on_gpus})
        for part in on_gpus:
            for result in self.sections[part].results:
                lines += ["", f"{result.name}: {result.found}.", "", *result.figures] if result.figures else []
        return lines


def lines_of(result: Result) -> list[str]:
    """Returns a finding as an item of a Markdown list."""
    lines = [f"- **{result.status}** {result.name}: {result.found}"]
    if result.remedy:
        lines.append(f"  - next: {result.remedy}")
    if result.lines:
        lines += ["", "  ```text", *(f"  {line}" for line in result.lines), "  ```", ""]
    return lines


def table_of_counts(results: dict[str, list[Result]]) -> list[str]:
    counts = {part: Counter(result.status for result in found) for part, found in results.items()}
    return table(["part", *STATUSES], [[part, *(str(count[s]) for s in STATUSES)] for part, count in counts.items()])


def passed(results: list[Result]) -> bool:
    """Returns whether everything that applies here was tried and works; a warning is no failure."""
    return not {FAILURE, LEFT_OUT} & {result.status for result in results}


def summary(results: list[Result]) -> str:
    counts = Counter(result.status for result in results)
    return ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
