"""What a run tells of itself: each optimizer step as a row of metrics.jsonl, a line of the log and a point in Weights &
Biases, and in status.json how the run stands.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

from arguments import TrainArguments
from utils import finite

logger = logging.getLogger("train")

EVALUATED = ("loss", "ce", "kl", "perplexity", "agreement", "mmlu")  # figures of an evaluation that the log tells


class RunLog:
    """Where the rows of optimizer steps go: `metrics.jsonl`, appended and flushed so that a run that dies keeps its
    lines; the log, every `log_interval` steps; W&B if asked for. Only the main rank writes.
    """

    def __init__(self, args: TrainArguments, start: int, is_main: bool) -> None:
        """start: the micro step from which the run goes on."""
        folder = Path(args.output_dir)
        self.log_interval = args.log_interval
        if is_main:
            _set_aside_rows_after(folder / "metrics.jsonl", start)
        self.file = (folder / "metrics.jsonl").open("ab", buffering=0) if is_main else None
        self.unwritten = b""  # what a full disk did not take; it is tried again with the next row
        self.told = False  # that it did not
        self.wandb_run = _start_wandb(args, folder) if is_main and args.wandb else None

    def write(self, row: dict[str, Any]) -> None:
        if self.file is None:
            return
        self._append(json.dumps(finite(row), allow_nan=False).encode() + b"\n")
        if row["step"] % self.log_interval == 0 or row["step"] == 1:
            logger.info(format_metrics(row))
        if "eval" in row:
            logger.info(format_evaluation(row))
        if self.wandb_run:
            self.wandb_run.log(row)

    def _append(self, line: bytes) -> None:
        assert self.file is not None
        self.unwritten += line
        try:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
            self.told = False
        except OSError as error:
            if not self.told:
                logger.warning(
                    "metrics.jsonl cannot be written (%s); its rows are kept until it can be", error.strerror
                )
            self.told = True

    def flush_to_disk(self) -> None:
        """So that a loss of power leaves the rows up to a checkpoint as well as the checkpoint."""
        if self.file is not None:
            with contextlib.suppress(OSError):  # told where the rows, or the checkpoint, are written
                os.fsync(self.file.fileno())

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if self.file:
            if self.unwritten:
                self._append(b"")
            self.file.close()
        if self.wandb_run:
            code = 0 if error_type is None else 1
            finish = threading.Thread(target=self.wandb_run.finish, kwargs={"exit_code": code}, daemon=True)
            finish.start()
            # After an error the other ranks wait to hear of it, and without its network W&B may not come back.
            finish.join(timeout=None if error_type is None else 10.0)


def _set_aside_rows_after(path: Path, micro_step: int) -> None:
    """A run that goes on from `micro_step` takes the steps after it again. What stands in `path` of the first time,
    a last line cut short by a crash included, moves to metrics.abandoned.jsonl, so that a curve drawn from `path`
    never goes back.
    """
    if not path.exists():
        return
    kept: list[str] = []
    abandoned: list[str] = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        (kept if _micro_step_of(line) <= micro_step else abandoned).append(line)
    if abandoned:
        with path.with_name("metrics.abandoned.jsonl").open("a") as file:
            file.writelines(abandoned)
        rewritten = path.with_name(".metrics.jsonl.partial")
        rewritten.write_text("".join(kept))
        rewritten.replace(path)


def _micro_step_of(line: str) -> float:
    """Infinity for a line that a crash or a loss of power has spoilt."""
    try:
        return json.loads(line)["micro_step"] if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _start_wandb(args: TrainArguments, folder: Path):
    """A W&B run; offline and disabled modes need no network."""
    import wandb  # takes a second, and only some runs want it

    run = wandb.init(
        project=args.wandb_project,
        name=args.wandb_run_name,
        entity=args.wandb_entity,
        mode=args.wandb_mode or ("offline" if args.local_files_only else None),
        dir=str(folder),
        config=dataclasses.asdict(args),
    )
    run.define_metric("*", step_metric="step")
    return run


def format_metrics(row: dict[str, Any]) -> str:
    """The line of one optimizer step, as it stands in the log."""
    return (
        f"micro_step {row['micro_step']} (opt {row['step']}) | loss {row['loss']:.4f} | kl {row['kl']:.4f} | "
        f"ce {row['ce']:.4f} | lr {row['lr']:.2e} | grad {row['grad_norm']:.2f} | tok/s {row['tokens_per_s']:,.0f} | "
        f"teacher wait {row['teacher_wait_s']:.2f}s"
    )


def format_evaluation(row: dict[str, Any]) -> str:
    """The line of the evaluation after an optimizer step; without a teacher it has no KL and no agreement."""
    figures = " | ".join(f"{name} {value:.4f}" for name, value in row["eval"].items() if name in EVALUATED)
    return f"evaluation (opt {row['step']}) | {figures} | {row['eval']['seconds']:.1f}s"


def write_status(output_dir: Path, status: str, code: int, **more: Any) -> None:
    """status.json: how the run stands (running, complete, stopped, diverged) and the exit code that says so."""
    partial = output_dir / ".status.json.partial"
    try:
        partial.write_text(json.dumps({"status": status, "exit_code": code, **more}, indent=2) + "\n")
        partial.replace(output_dir / "status.json")
    except OSError as error:  # the run itself is more important
        logger.warning("status.json cannot be written (%s)", error.strerror)


def begin_status(output_dir: Path) -> float:
    """status.json says "running" from here on, to the run's death if that is how it ends. Returns when torchrun
    launched the run, in seconds since the epoch: its restarts keep that time.
    """
    launched = time.time()
    if _restarts() and (output_dir / "status.json").is_file():
        launched = json.loads((output_dir / "status.json").read_text()).get("launched", launched)
    write_status(output_dir, "running", 0, launched=launched)
    return launched


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def ended_before_restart(output_dir: Path) -> int | None:
    """The exit code of the workers that torchrun has restarted, if they had stopped for good: under --max-restarts
    torchrun takes every code but 0 for a failure and starts the workers again.
    """
    if not _restarts() or not (output_dir / "status.json").is_file():
        return None
    status = json.loads((output_dir / "status.json").read_text())
    if status["status"] not in ("stopped", "diverged"):
        return None
    logger.warning("not started again: %s", status["text"])
    return status["exit_code"]
