"""The progress bar on a terminal: optimizer steps, the time left and the most important figures of the last step. Lines
of the log are printed above it. Without a terminal there is no bar, and the log's lines say the same.
"""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from monitoring.layer_errors import errors_by_layer, mean_error

LOGGERS = ("train", "llamba")  # whose lines a run shows


class Eta:
    """Estimates the time left from the steps that this process has seen. Evaluations and saves between them count; the
    first step does not, because it may compile.
    """

    def __init__(self, total_steps: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.total_steps, self.clock = total_steps, clock
        self.first: tuple[int, float] | None = None  # a step, and when it was done

    def seconds(self, step: int) -> float | None:
        """Returns the seconds left when `step` has just been completed, or None while nothing is known."""
        now = self.clock()
        if self.first is None:
            self.first = step, now
        first_step, began = self.first
        if self.total_steps is None or step == first_step:
            return None
        return (now - began) / (step - first_step) * (self.total_steps - step)


def format_clock(seconds: float | None) -> str:
    """Returns a time such as 3:10:25, and 2d 03:10 from a day on."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}:{minutes:02d}" if days else f"{hours}:{minutes:02d}:{rest:02d}"


def format_speed(row: dict[str, Any]) -> list[str]:
    """Returns what a row says about the GPUs."""
    figures = [f"mfu {100 * row['mfu']:.1f}%"] if "mfu" in row else []
    return [*figures, f"mem {row['memory_gb']:.1f} GB"] if "memory_gb" in row else figures


def has_terminal() -> bool:
    """Returns whether standard error is a terminal that can rewrite a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class ProgressBar:
    """Draws the bar; until it is closed, lines of the log and warnings are printed above it."""

    name = "the progress bar"

    def __init__(self, step: int, total_steps: int, eta: Eta) -> None:
        """step: the optimizer step that the run begins after."""
        self.eta = eta
        self.redirection = contextlib.ExitStack()
        self.redirection.enter_context(logging_redirect_tqdm([logging.getLogger(name) for name in LOGGERS]))
        self.bar = _Bar(
            initial=step,
            total=total_steps,
            file=sys.stderr,
            dynamic_ncols=True,
            miniters=1,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, eta {eta}]{postfix}",
        )

    def write(self, row: dict[str, Any]) -> None:
        self.bar.eta = format_clock(self.eta.seconds(row["step"]))
        loss, speed = f"loss {row['loss']:.4f}", [f"{row['tokens_per_s']:,.0f} tok/s", *format_speed(row)]
        if errors := errors_by_layer(row):  # the stage `align`, in which no teacher is waited for
            parts = [loss, f"error {mean_error(errors):.4f}", *speed]
        else:
            parts = [loss, *speed, f"teacher wait {100 * row['teacher_wait_s'] / row['step_time_s']:.0f}%"]
        self.bar.set_postfix_str(" | ".join(parts), refresh=False)
        self.bar.update(row["step"] - self.bar.n)

    def close(self, status: str, failed: bool) -> None:
        self.bar.close()
        self.redirection.close()


class _Bar(tqdm):
    monitor_interval = 0  # no thread: each step draws
    eta = format_clock(None)

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "eta": self.eta}
