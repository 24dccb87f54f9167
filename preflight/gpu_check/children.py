"""Starts the processes of `make gpu-check`. Each writes to a log and can be ended with everything that it has started;
those that check something print what they find, a line of JSON each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

from preflight.gpu_check.results import Result

if TYPE_CHECKING:
    from collections.abc import Callable

    from preflight.checks.basics import Finding

ROOT = Path(__file__).parents[2]
FOUND = "found by the check: "  # before the JSON of a finding, in a log
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}

_started: list[Child] = []


class Child:
    """A process in a session of its own. Its output is appended to `log`; `environment` is added to
    this process's.
    """

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        self.log, self.begun = log, time.monotonic()
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        variables = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(environment or {})}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        _started.append(self)

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def wait(self, seconds: float) -> str | None:
        """Returns how the process failed, or None. After so many seconds it is ended, and that is a failure."""
        try:
            code = self.process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.kill()
            return f"stopped after {time.monotonic() - self.begun:.0f} s"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}" if code else None

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Waits for a condition, which is looked at often. Returns whether it was met before the process ended."""
        ends = time.monotonic() + seconds
        while not condition():
            if self.has_ended or time.monotonic() > ends:
                return False
            time.sleep(0.005)
        return True

    def pids(self) -> list[int]:
        """Returns the process and all that it has started, through any number of parents and sessions."""
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    children.setdefault(parent, []).append(int(entry.name))
        found = [self.process.pid]
        for pid in found:
            found += children.get(pid, [])
        return found

    def kill(self) -> None:
        """Ends the process and all that it has started, by SIGKILL."""
        for pid in self.pids() if not self.has_ended else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def end_all() -> None:
    """Ends all processes that are still running."""
    for child in _started:
        if not child.has_ended:
            child.kill()


def last_lines(log: Path, n: int = 15) -> list[str]:
    """Returns the last lines of a log that are not empty, each cut to what can be read."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [line[:200] for line in lines if line.strip()][-n:]


def emit(finding: Finding) -> None:
    """Prints a finding for the process that started this one."""
    print(FOUND + json.dumps(dataclasses.asdict(finding)), flush=True)


def emitted(log: Path) -> list[Result]:
    """Returns the findings that a process has printed."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return [Result(**json.loads(line.removeprefix(FOUND))) for line in lines if line.startswith(FOUND)]
