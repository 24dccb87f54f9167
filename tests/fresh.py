"""Real processes for tests, each as it is when everything has been imported and nothing computed. A process that starts
from nothing imports for some six seconds; here one server does, for all tests of a test process, and what is asked for
are its forks. (Not forks of the test process: torch's threads, once there, are missing in a fork.)
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

import train_gpus
from processes.exits import run_entry
from tests.faults.launch import ROOT, Launch

CONTEXT = multiprocessing.get_context("forkserver")
# The entries, and what torch and transformers import only when they are used.
IMPORTED = ["train_gpus", "eval_mmlu_hybrid", "tests.faults.launch", "scipy.io", "threadpoolctl"]

Main = Callable[[], int | None]


class Process:
    """Runs `function(*args)`, with this process's environment but for these changes, in this process's directory."""

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
        """What it has written so far."""
        return Path(self.log).read_text(errors="replace")

    def result(self, timeout: float = 280.0) -> Any:
        """What the function has returned. A process that fails is an AssertionError with what it wrote."""
        done = wait([self.receiver, self.process.sentinel], timeout)
        if self.receiver in done:
            with contextlib.suppress(EOFError):
                return self.receiver.recv()
        self.process.join(timeout=1)
        raise AssertionError(f"no result, exit code {self.process.exitcode}\n{self.written()[-5000:]}")

    def close(self) -> None:
        """Kills it if it is still there."""
        self.process.kill()
        self.process.join()
        self.receiver.close()
        os.unlink(self.log)


def _work(
    function: Callable, args: tuple, environment: dict[str, str], folder: str, method: str, log: str, sender
) -> None:
    multiprocessing.set_start_method(method, force=True)  # the server's forks would otherwise ask it for theirs
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sender.send(function(*args))


@contextlib.contextmanager
def started(function: Callable, *args: Any, **environment: str) -> Iterator[Process]:
    process = Process(function, *args, **environment)
    try:
        yield process
    finally:
        process.close()


def call(function: Callable, *args: Any, **environment: str) -> Any:
    """What `function(*args)` returns in a fresh process."""
    with started(function, *args, **environment) as process:
        return process.result()


def ranks(
    argv: list[str], n_ranks: int, main: Main = train_gpus.main, arm: Callable[[int], None] | None = None, **environment
) -> tuple[list[int], str]:
    """Exit codes and words of the ranks of an entry, started as torchrun starts them."""
    with tempfile.TemporaryDirectory() as folder:
        return call(_launch, argv, n_ranks, Path(folder) / "log", arm, main, **environment)


def _launch(argv: list[str], n_ranks: int, log: Path, arm, main: Main) -> tuple[list[int], str]:
    launch = Launch(argv, n_ranks, log, arm, main)
    return launch.wait(timeout=240), launch.text()


def script(argv: list[str], main: Main, **environment: str) -> tuple[int, str]:
    """Exit code and words of an entry that is started by `python` alone."""
    with started(_script, argv, main, **environment) as process:
        return process.result(), process.written()


def _script(argv: list[str], main: Main) -> int:
    sys.argv = [main.__module__, *argv]
    code = run_entry(main)
    sys.stdout.flush()
    return code
