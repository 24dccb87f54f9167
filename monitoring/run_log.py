"""The rows of a run: each optimizer step is a row of metrics.jsonl, and is shown in the log, on a bar, in Weights &
Biases and in TensorBoard.
"""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from appended_file import AppendedFile
from arguments import TrainArguments
from checkpointing.run_folder import explaining_write_errors, read_status
from checkpointing.small_files import FolderWatch
from monitoring.layer_errors import errors_by_layer, mean_error, worst_layers
from monitoring.progress_bar import Eta, ProgressBar, format_clock, format_speed, has_terminal
from monitoring.speed import Gauges
from monitoring.trackers import Tracker, start_trackers
from utils import finite

logger = logging.getLogger("train")

LOGGED = ("loss", "ce", "kl", "perplexity", "agreement", "mmlu")  # figures of an evaluation that the log shows


class RunLog:
    """Writes the rows of optimizer steps to `metrics.jsonl` and to what shows them. Only the main rank writes."""

    def __init__(
        self,
        args: TrainArguments,
        start: int,
        is_main: bool,
        *,
        step: int = 0,
        total_steps: int | None = None,
        gauges: Gauges | None = None,
    ) -> None:
        """start: the micro step that the run begins after; step: its optimizer step, of `total_steps`. gauges: add
        their readings to the rows. Raises ValueError if a file or a tracker cannot be opened.
        """
        self.folder, self.gauges = Path(args.output_dir), gauges
        self.file: MetricsFile | None = None
        self.outputs: list[Tracker] = []
        if not is_main:
            return
        self.file = MetricsFile(self.folder / "metrics.jsonl", start)
        trackers = start_trackers(args, self.file.rows, step) if args.wandb or args.tensorboard else []
        eta = Eta(total_steps)
        self.outputs.append(LogLines(args.log_interval, eta))
        if total_steps is not None and has_terminal():
            self.outputs.append(ProgressBar(step, total_steps, eta))
        self.outputs += trackers
        self.watch = FolderWatch(self.folder)

    def write(self, row: dict[str, Any]) -> None:
        """Writes and shows a row. Raises TakenError if the folder was removed and is another run's by now."""
        if self.file is None:
            return
        if self.gauges is not None:
            row = row | self.gauges.read(row["tokens_per_s"])
        self.watch.renew()
        self.file.write(row)
        for output in self.outputs.copy():
            self._try(output, output.write, row)

    def _try(self, output: Tracker, act: Callable[..., None], *arguments: Any) -> None:
        try:
            act(*arguments)
        except Exception as error:  # of any kind: training is more important than what shows it
            self.outputs.remove(output)
            logger.warning("%s: %s: %s; it gets no more rows", output.name, type(error).__name__, error)

    def flush_to_disk(self) -> None:
        """Flushes the rows, so that a loss of power leaves those up to a checkpoint as well as the checkpoint."""
        if self.file is not None:
            self.watch.renew()
            self.file.flush_to_disk()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if self.file is None:
            return
        self.file.close()
        status = read_status(self.folder).get("status", "running")
        for output in self.outputs.copy():
            self._try(output, output.close, status if error_type is None else "failed", error_type is not None)


class MetricsFile(AppendedFile):
    """Appends rows to `metrics.jsonl`."""

    def __init__(self, path: Path, start: int) -> None:
        """start: the micro step after which the run repeats the steps of rows that are in the file already."""
        super().__init__(path, rows_after)
        with explaining_write_errors(path.parent):
            _set_aside_rows_after(path, start)
            self.open()

    def rows(self) -> list[dict[str, Any]]:
        """Returns all whole rows of the file."""
        return [json.loads(line) for line in self.path.read_bytes().split(b"\n")[:-1]]

    def write(self, row: dict[str, Any]) -> None:
        self.append(json.dumps(finite(row), allow_nan=False).encode() + b"\n")


def rows_after(before: bytes, now: bytes) -> bytes:
    """Returns the rows of the first content that come after those of the second."""
    reached = max((step for line in lines_of(now) if (step := _micro_step_of(line)) < math.inf), default=-math.inf)
    return b"".join(line for line in lines_of(before) if _micro_step_of(line) > reached)


def lines_of(content: bytes) -> list[bytes]:
    return content.splitlines(keepends=True)


def _set_aside_rows_after(path: Path, micro_step: int) -> None:
    """Moves the rows after `micro_step` to metrics.abandoned.jsonl, a last line cut short by a crash included. A run
    that resumes there repeats these steps, and a curve drawn from `path` must not have them twice.
    """
    if not path.exists():
        return
    kept: list[bytes] = []
    abandoned: list[bytes] = []
    for line in lines_of(path.read_bytes()):
        (kept if _micro_step_of(line) <= micro_step else abandoned).append(line)
    if abandoned:
        with path.with_name("metrics.abandoned.jsonl").open("ab") as file:
            file.writelines(abandoned)
        rewritten = path.with_name(".metrics.jsonl.partial")
        rewritten.write_bytes(b"".join(kept))
        rewritten.replace(path)


def _micro_step_of(line: bytes) -> float:
    """Returns the micro step of a row, infinity for a line that a crash has damaged."""
    try:
        return float(json.loads(line)["micro_step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError, OverflowError):
        return math.inf


# --- the log -------------------------------------------------------------------------------------------------


class LogLines:
    """Logs a line for the first step, for every `interval`th, and for evaluations."""

    name = "the log"

    def __init__(self, interval: int, eta: Eta) -> None:
        self.interval, self.eta = interval, eta

    def write(self, row: dict[str, Any]) -> None:
        left = self.eta.seconds(row["step"])
        if row["step"] % self.interval == 0 or row["step"] == 1:
            logger.info(format_metrics(row, left))
        if "eval" in row:
            logger.info(format_evaluation(row))

    def close(self, status: str, failed: bool) -> None:
        pass


def format_metrics(row: dict[str, Any], seconds_left: float | None = None) -> str:
    """Returns the log line of one optimizer step. In the stage `align` no loss is made with text and no teacher is
    waited for: the line has the errors of the layers instead.
    """
    step = f"micro_step {row['micro_step']} (opt {row['step']}) | loss {row['loss']:.4f}"
    update = f"lr {row['lr']:.2e} | grad {row['grad_norm']:.2f} | tok/s {row['tokens_per_s']:,.0f}"
    if errors := errors_by_layer(row):
        learned, waited = f"error {mean_error(errors):.4f} | worst layers {worst_layers(errors)}", []
    else:
        learned, waited = f"kl {row['kl']:.4f} | ce {row['ce']:.4f}", [f"teacher wait {row['teacher_wait_s']:.2f}s"]
    left = [] if seconds_left is None else [f"eta {format_clock(seconds_left)}"]
    return " | ".join([step, learned, update, *waited, *format_speed(row), *left])


def format_evaluation(row: dict[str, Any]) -> str:
    """Returns the log line of an evaluation; without a teacher it has no KL and no agreement."""
    figures = " | ".join(f"{name} {value:.4f}" for name, value in row["eval"].items() if name in LOGGED)
    return f"evaluation (opt {row['step']}) | {figures} | {row['eval']['seconds']:.1f}s"
