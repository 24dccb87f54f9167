"""Checks a machine with GPUs in under ten minutes, for somebody who has never seen this code:

    make gpu-check
    make gpu-check PARTS=train

`first` is the environment, the kernels and the doctor; `train` are tiny runs through every path that differs on a GPU,
with losses against the CPU's; `bench` measures steps of 8B shapes. A part that is run alone has nine minutes. The
report is written as findings come; the exit code is 0 only if everything that applies to this machine passed. Without a
GPU it runs what applies and says that nothing ran on one.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from preflight.checks.basics import FAILURE, file_problem
from preflight.gpu_check import bench, first, train
from preflight.gpu_check.children import ROOT, Child, end_all, last_lines
from preflight.gpu_check.facts import Facts, read_facts
from preflight.gpu_check.report import NOTHING_RAN, Report, passed, summary
from preflight.gpu_check.results import Result, Session

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PARTS: dict[str, Callable[[Session], Iterator[Result]]] = {
    "first": first.check,
    "train": train.check,
    "bench": bench.check,
}
SHARES = {"first": 160.0, "train": 210.0, "bench": 200.0}  # seconds of each where all run: under ten minutes
ALONE = 520.0  # of a part that runs by itself: under nine minutes
FACTS_WAIT = 120.0  # for the first import of torch, which can be from a slow disk


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    options = parse(argv)
    if problem := file_problem(options.output):
        print(f"error: --output {options.output}: {problem}; name another file", file=sys.stderr)
        return 2
    begun = time.monotonic()
    facts, problem = learn_facts(options.work)
    if facts is None:
        print(f"failure  this machine: {problem}\n         -> python doctor.py   says which packages are missing")
        return 1
    print(f"{facts.date}, {facts.machine}")
    report = Report(options.output, options.work, list(PARTS))
    ends = part_ends(options.parts, begun, options.minutes)
    try:
        for part in options.parts:
            started, folder = time.monotonic(), options.work / part
            shutil.rmtree(folder, ignore_errors=True)  # logs and runs of an earlier check
            report.begin(part, facts)
            for result in findings(part, Session(facts, folder, ends[part])):
                report.add(part, result)
            report.end(part, time.monotonic() - started)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was found before is in {options.output}")
        return 130
    finally:
        end_all()
    results = [result for part in options.parts for result in report.sections[part].results]
    print(f"\n{summary(results)}, in {time.monotonic() - begun:.0f} s; the report is {options.output}")
    if not facts.gpus:
        print(NOTHING_RAN.replace("*", ""))
    return 0 if passed(results) else 1


def findings(part: str, session: Session) -> Iterator[Result]:
    """Yields what a part finds. An error of the check itself is a finding too, and the next part runs."""
    try:
        yield from PARTS[part](session)
    except Exception as error:
        remedy = "this is a mistake in the check: report it with these lines"
        lines = "".join(traceback.format_exception(error)).splitlines()
        yield Result(FAILURE, part, f"{type(error).__name__}: {error}", remedy, lines[-15:])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m preflight.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--output", type=Path, default=ROOT / "gpu-check.md", metavar="FILE", help="the report")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "gpu-check", metavar="DIR", help="logs and runs")
    parser.add_argument("--minutes", type=float, metavar="M", help="for everything (default: 9.5, a part alone 8.7)")
    return parser.parse_args(argv)


def part_ends(parts: list[str], begun: float, minutes: float | None) -> dict[str, float]:
    """Returns when each part ends at the latest. What one leaves of its share is the next one's."""
    shares = {part: SHARES[part] for part in parts} if len(parts) > 1 else dict.fromkeys(parts, ALONE)
    factor = 1.0 if minutes is None else 60 * minutes / sum(shares.values())
    ends, end = {}, begun
    for part in parts:
        end += factor * shares[part]
        ends[part] = end
    return ends


def learn_facts(work: Path) -> tuple[Facts | None, str]:
    """Returns the facts of this machine, or None and why they cannot be found."""
    log = work / "facts.log"
    log.unlink(missing_ok=True)
    problem = Child([sys.executable, "-m", "preflight.gpu_check.facts"], log).wait(FACTS_WAIT)
    facts = None if problem else read_facts(log)
    return facts, "\n".join([problem or "no facts", *last_lines(log)])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # its processes have sessions of their own: end them
    sys.exit(main())
