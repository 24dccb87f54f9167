"""A tiny run that is stopped by SIGTERM, resumed, killed by `kill -9`, and resumed again to its end."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from preflight.gpu_check.runs import LIMIT, STEPS, Run, new_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from preflight.gpu_check.children import Child
    from preflight.gpu_check.results import Session

    Interrupt = Callable[[Run, Child, float], str | None]

NAME = "SIGTERM, kill -9, resumed"
# Every step saves in the foreground and is evaluated, so that it takes long enough to be interrupted.
OFTEN = "--no_background_save --save_interval 1 --eval_interval 1 --resume auto"
APART = 4  # steps from one interruption to the next


def interrupt_and_resume(session: Session, options: str) -> Run:
    """Returns the run as it ended, with a problem if an interruption was not what it should be."""
    run = new_run(session, NAME, f"{options} {OFTEN}")
    for interrupt in (stop, kill):
        if session.is_late:
            run.is_left_out = True
            return run
        run.problem = run_until(run, len(run.rows) + APART, interrupt, min(session.seconds_left, LIMIT))
        if run.problem is not None:
            return run
    run.finish(session)
    steps = [row["step"] for row in run.rows]
    if run.problem is None and not run.is_left_out and steps != list(range(1, STEPS + 1)):
        run.problem = f"metrics.jsonl has the steps {steps}, expected each step once"
    return run


def run_until(run: Run, step: int, interrupt: Interrupt, seconds: float) -> str | None:
    """Starts a run and interrupts it after a step. Returns what went wrong, or None."""
    ends, child = time.monotonic() + seconds, run.start()
    if child.wait_until(lambda: len(run.rows) >= step, seconds):
        return interrupt(run, child, ends - time.monotonic())
    ended = child.has_ended
    child.kill()
    how = "ended" if ended else f"stopped after {seconds:.0f} s"
    return f"{how} before step {step}, where it was to be interrupted"


def stop(run: Run, child: Child, seconds: float) -> str | None:
    """Stops a run by SIGTERM as a batch system does. Returns what is wrong with how it ended, or None."""
    os.kill(child.process.pid, signal.SIGTERM)
    problem = child.wait(min(seconds, 90.0)) or ""
    if "stopped after" in problem:
        return f"SIGTERM did not end it: {problem}"
    if run.status["status"] != "stopped":
        return f"after SIGTERM status.json says {run.status['status']}: {run.status['text']}"
    saved = run.folder / f"checkpoint-{run.status['micro_step']}"
    return None if saved.is_dir() else f"after SIGTERM there is no {saved.name}"


def kill(run: Run, child: Child, seconds: float) -> str | None:
    child.kill()
    return None if run.status["status"] == "running" else f"ended before kill -9: {run.status['text']}"
