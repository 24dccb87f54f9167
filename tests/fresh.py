"""Fresh processes for tests: everything is imported, nothing computed. A process that starts from nothing imports for
some six seconds; here one server does so for all tests of a test process and forks itself on demand. (The test process
itself cannot be forked: torch's threads, once started, are missing in a fork.)
"""

import contextlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

import train_gpus
from processes.exits import run_entry
from tests.launch import ROOT, Arm, Launch, Main

CONTEXT = multiprocessing.get_context("forkserver")
# The entries, and what torch and transformers import only when they are used.
IMPORTED = [
    "train_gpus",
    "eval_mmlu_hybrid",
    "choose_layers",
    "tests.small_runs",
    "pytest",
    "scipy.io",
    "threadpoolctl",
]


class Process:
    """Runs `function(*args)` in a process, in this directory and in this environment with the given changes."""

    def __init__(self, function: Callable, *args: Any, **environment: str) -> None:
        CONTEXT.set_forkserver_preload(IMPORTED)
        self.receiver, sender = CONTEXT.Pipe(duplex=False)
        descriptor, self.log = tempfile.mkstemp()
        os.close(descriptor)
        here = ({**os.environ, **environment}, os.getcwd(), multiprocessing.get_start_method())
        self.process = CONTEXT.Process(target=_work, args=(function, args, *here, self.log, sender))
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)):
            self.process.start()  # and the server, if there is none yet
        sender.close()

    def written(self) -> str:
        """Returns what the process has written so far."""
        return Path(self.log).read_text(errors="replace")

    def result(self, timeout: float = 280.0) -> Any:
        """Returns what the function returned. Raises AssertionError with the output of a process that failed."""
        done = wait([self.receiver, self.process.sentinel], timeout)
        if self.receiver in done:
            with contextlib.suppress(EOFError):
                return self.receiver.recv()
        self.process.join(timeout=1)
        raise AssertionError(f"no result, exit code {self.process.exitcode}\n{self.written()[-5000:]}")

    def close(self) -> None:
        """Kills the process if it is still running."""
        self.process.kill()
        self.process.join()
        self.receiver.close()
        os.unlink(self.log)


def _work(
    function: Callable, args: tuple, environment: dict[str, str], folder: str, method: str, log: str, sender
) -> None:
    multiprocessing.set_start_method(method, force=True)  # otherwise forks of the server use "forkserver"
    os.environ.clear()
    os.environ.update(environment)
    dist.set_debug_level_from_env()  # which torch reads when it is imported
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sender.send(function(*args))


@contextlib.contextmanager
def started(function: Callable, *args: Any, **environment: str) -> Iterator[Process]:
    """Yields a fresh process that runs `function(*args)`, and kills it afterwards."""
    process = Process(function, *args, **environment)
    try:
        yield process
    finally:
        process.close()


def call(function: Callable, *args: Any, **environment: str) -> Any:
    """Returns what `function(*args)` returns in a fresh process."""
    with started(function, *args, **environment) as process:
        return process.result()


def ranks(
    argv: list[str],
    n_ranks: int,
    main: Main = train_gpus.main,
    arm: Arm | None = None,
    ranks_per_node: int | None = None,
    **environment: str,
) -> tuple[list[int], str]:
    """Runs an entry on forked ranks; returns their exit codes and what they wrote."""
    with tempfile.TemporaryDirectory() as folder:
        return call(_launch, argv, n_ranks, Path(folder) / "log", arm, main, ranks_per_node, **environment)


def _launch(argv: list[str], n_ranks: int, log: Path, *arm_main_and_nodes) -> tuple[list[int], str]:
    launch = Launch(argv, n_ranks, log, *arm_main_and_nodes)
    return launch.wait(), launch.text()


def script(argv: list[str], main: Main, **environment: str) -> tuple[int, str]:
    """Runs an entry as `python` starts it; returns its exit code and what it wrote."""
    with started(_script, argv, main, **environment) as process:
        return process.result(), process.written()


def _script(argv: list[str], main: Main) -> int:
    sys.argv = [main.__module__, *argv]
    code = run_entry(main)
    sys.stdout.flush()
    return code
