"""What every entry needs around its work: the environment of a run, the logger, metrics.jsonl, Weights & Biases, the
output directory, and figures that people can read.
"""

import dataclasses
import functools
import importlib.util
import json
import logging
import math
import os
import platform
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers

from arguments import TrainArguments

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


def prepare_output_dir(output_dir: str, resume_step: int) -> Path:
    """Makes the directory, tries that it can be written, and refuses one that holds another run's results, which
    this run would overwrite. Raises ValueError.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"--output_dir {output_dir}: cannot be written ({error.strerror}); choose a directory of your own"
        ) from error
    found = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.iterdir()]
    steps = [int(match[1]) for match in found if match]
    if any(step >= max(resume_step, 1) and step != resume_step for step in steps) or (steps and not resume_step):
        raise ValueError(
            f"--output_dir {output_dir}: holds checkpoints up to checkpoint-{max(steps)}, which this run would "
            "overwrite; choose another directory, or move the old one away"
        )
    return folder


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

    def __init__(self, args: TrainArguments, is_main: bool) -> None:
        folder = Path(args.output_dir)
        self.log_interval = args.log_interval
        if is_main:
            _set_aside_rows_after(folder / "metrics.jsonl", args.resume_step)
        self.file = (folder / "metrics.jsonl").open("a") if is_main else None
        self.wandb_run = _start_wandb(args, folder) if is_main and args.wandb else None

    def write(self, row: dict[str, Any]) -> None:
        if self.file is None:
            return
        # JSON has no infinity, which the gradient norm of a skipped float16 step can be.
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self.file.write(json.dumps(finite, allow_nan=False) + "\n")
        self.file.flush()
        if row["step"] % self.log_interval == 0 or row["step"] == 1:
            logger.info(format_metrics(row))
        if self.wandb_run:
            self.wandb_run.log(row)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        if self.file:
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
    for line in path.read_text().splitlines(keepends=True):
        whole = line.endswith("\n")
        (kept if whole and json.loads(line)["micro_step"] <= micro_step else abandoned).append(line)
    if abandoned:
        with path.with_name("metrics.abandoned.jsonl").open("a") as file:
            file.writelines(abandoned)
        rewritten = path.with_name(".metrics.jsonl.partial")
        rewritten.write_text("".join(kept))
        rewritten.replace(path)


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


def run_entry(main: Callable[[], None]) -> int:
    """Runs an entry's `main`; what a user can put right (ValueError) is one line, without a traceback.

    Under torchrun every rank finds the same mistake, and the first rank to end takes the others with it; so rank
    0 speaks, and the others give it time to.
    """
    try:
        main()
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if "site-packages" in raised_in.parts:
            raise  # a library's, which no check of ours foresaw: where it happened matters
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0
