"""What every entry needs around its work: the environment of a run, the logger, metrics.jsonl, Weights & Biases, the
output directory, and figures that people can read.
"""

import contextlib
import dataclasses
import fcntl
import functools
import importlib.util
import json
import logging
import math
import os
import platform
import queue
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import transformers

from arguments import TrainArguments
from stopping import EXIT_STOPPED, Interrupted, hearing_signals

logger = logging.getLogger("train")

T = TypeVar("T")


def setup_logging(log_file: str | None, is_main: bool) -> None:
    """Lines as `[train] ...` on standard error and in `log_file`, from the main rank; warnings from all."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    formatter = logging.Formatter("[%(name)s] %(message)s")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if log_file and is_main:
        try:
            Path(log_file).parent.mkdir(parents=True, exist_ok=True)
            handlers.append(logging.FileHandler(log_file))
        except OSError as error:
            raise ValueError(f"--log_file {log_file}: cannot be written ({error.strerror}); name another") from error
    for name in ("train", "llamba"):
        log = logging.getLogger(name)
        log.handlers.clear()
        log.setLevel(logging.INFO if is_main else logging.WARNING)
        log.propagate = False
        for handler in handlers:
            handler.setFormatter(formatter)
            log.addHandler(handler)


def describe_environment() -> str:
    """Versions, devices and the NCCL settings that cost speed or memory, in one line."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    nccl = {name: value for name, value in sorted(os.environ.items()) if name.startswith(("NCCL_", "TORCH_NCCL_"))}
    parts = [
        f"python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
        f"GPUs {', '.join(devices) if devices else 'none'}",
    ]
    parts += [f"{name}={value}" for name, value in nccl.items()]
    return " | ".join(parts)


def checked_device(flag: str, name: str | None) -> torch.device:
    """The device that `name` means, or the first GPU, or the CPU. Raises ValueError if it is not there."""
    n_gpus = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda:0" if n_gpus else "cpu")
    expected = "expected cpu" + (f" or cuda:0 to cuda:{n_gpus - 1}" if n_gpus else "; check CUDA_VISIBLE_DEVICES")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{flag} {name}: {n_gpus} GPUs are visible here; {expected}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= n_gpus):
        raise ValueError(f"{flag} {name}: {n_gpus} GPUs are visible here; {expected}")
    return device


@functools.cache
def can_compile(device_type: str) -> bool:
    """Whether torch.compile has what it needs for "cpu", a C++ compiler, or for "cuda", Triton and a C compiler."""
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return False
    names = ("CXX", "c++", "g++", "clang++") if device_type == "cpu" else ("CC", "cc", "gcc", "clang")
    return any(shutil.which(name) for name in (os.environ.get(names[0], ""), *names[1:]))


def check_compiler(device_type: str) -> None:
    if not can_compile(device_type):
        needed = "a C++ compiler" if device_type == "cpu" else "Triton and a C compiler"
        raise ValueError(f"--compile: torch.compile needs {needed}, not found here; install it or leave the option out")


def lock_output_dir(output_dir: str) -> IO[str]:
    """Makes the directory and takes it for this process, until the lock is closed. Raises ValueError if it cannot be
    written or belongs to a run that is still going on.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        lock = (Path(output_dir) / ".lock").open("w")
    except OSError as error:
        raise ValueError(
            f"--output_dir {output_dir}: cannot be written ({error.strerror}); choose a directory of your own"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"--output_dir {output_dir}: another run is writing there; wait for its end, or choose another directory"
        ) from error
    except OSError as error:  # some network file systems have no locks
        logger.warning("--output_dir %s cannot be locked (%s): start no second run there", output_dir, error.strerror)
    return lock


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        # JSON has no infinity, which loss and gradient norm of a skipped step can be.
        finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        self._append(json.dumps(finite, allow_nan=False).encode() + b"\n")
        if row["step"] % self.log_interval == 0 or row["step"] == 1:
            logger.info(format_metrics(row))
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
            self.wandb_run.finish(exit_code=0 if error_type is None else 1)


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


class BackgroundThread:
    """One thread that does its jobs in order. It ends with the process: a job that hangs because another rank died
    must not keep this process alive.
    """

    def __init__(self, name: str) -> None:
        self.jobs: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name=name, daemon=True)
        self.thread.start()

    def submit(self, job: Callable[[], Any]) -> Future:
        future: Future = Future()
        self.jobs.put((future, job))
        return future

    def close(self) -> None:
        self.jobs.put(None)
        self.thread.join()

    def _work(self) -> None:
        while (item := self.jobs.get()) is not None:
            future, job = item
            try:
                future.set_result(job())
            except BaseException as error:  # raised again where the result is asked for
                future.set_exception(error)
            del item, future, job  # they hold an answer, which may be large, and the next job may be long in coming


class Stopwatch:
    """Seconds since it was made or last read."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self.start = now - self.start, now
        return elapsed


class TimedIterator(Iterator[T]):
    """Hands on another iterator's items and counts the seconds that they made the caller wait."""

    def __init__(self, items: Iterable[T]) -> None:
        self.items = iter(items)
        self.seconds = 0.0

    def __next__(self) -> T:
        start = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - start

    def take(self) -> float:
        """Seconds since the last take."""
        taken, self.seconds = self.seconds, 0.0
        return taken


def format_metrics(row: dict[str, Any]) -> str:
    """The line of one optimizer step, as it stands in the log."""
    return (
        f"micro_step {row['micro_step']} (opt {row['step']}) | loss {row['loss']:.4f} | kl {row['kl']:.4f} | "
        f"ce {row['ce']:.4f} | lr {row['lr']:.2e} | grad {row['grad_norm']:.2f} | tok/s {row['tokens_per_s']:,.0f} | "
        f"teacher wait {row['teacher_wait_s']:.2f}s"
    )


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


def run_entry(main: Callable[[], int | None]) -> int:
    """Runs an entry's `main` and returns its exit code; what a user can put right (ValueError) is one line, without a
    traceback, and so is a signal.

    Under torchrun every rank finds the same mistake, and the first rank to end takes the others with it; so rank
    0 speaks, and the others give it time to.
    """
    try:
        with hearing_signals():
            return main() or 0
    except Interrupted as signal:
        print(f"stopped by {signal} with nothing to save", file=sys.stderr, flush=True)
        return EXIT_STOPPED
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if "site-packages" in raised_in.parts:
            raise  # a library's, which no check of ours foresaw: where it happened matters
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
