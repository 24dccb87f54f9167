"""How a process stops, and with which exit code. A signal or the time limit requests it. Training checks the request
between micro steps and saves before it stops; outside training there is nothing to save, and a signal ends the process
at once.
"""

import functools
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from processes.streams import flush_standard_output, is_of_standard_output, open_closed_streams

T = TypeVar("T")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REASONS = ("", *(s.name for s in SIGNALS), "--time_limit")  # by the code that the ranks agree on

# By these a batch script knows how a process ended. 0: the run is complete. 2: an option or input has to be corrected.
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: start it again with --resume auto
EXIT_DIVERGED = 76

SIGNAL_WAIT_S = 3.0  # for the main thread to handle a signal by itself


class Interrupted(BaseException):
    """Ends a process that gets a signal outside training, whose name is its text. `run_entry` alone catches it."""


class StopRequest:
    """Says whether this process has been asked to stop: `code` is an index into REASONS, 0 if not."""

    def __init__(self, time_limit: float | None) -> None:
        """time_limit: minutes from now."""
        self.deadline = None if time_limit is None else time.monotonic() + 60 * time_limit
        self.process = os.getpid()
        self.signalled = 0
        self.is_deferred = False
        self.agreed = 0  # the code that all ranks stop for

    def count_from(self, seconds_ago: float) -> None:
        """Starts the time limit so many seconds ago."""
        if self.deadline is not None:
            self.deadline -= seconds_ago

    @property
    def code(self) -> int:
        late = self.deadline is not None and time.monotonic() > self.deadline
        return self.signalled or (len(REASONS) - 1 if late else 0)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Lets a signal within the block only set `code`. So it does after an error in the block, which must reach its
        handlers.
        """
        self.is_deferred = True
        yield
        self.is_deferred = False

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal: records it, and outside training raises Interrupted."""
        if os.getpid() != self.process:  # a forked loader worker inherits this handler and should just die
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.signalled = SIGNALS.index(signal.Signals(number)) + 1
        if not self.is_deferred:
            raise Interrupted(REASONS[self.signalled])

    def exit_if_stuck(self, wakeups: socket.socket) -> None:
        """Ends the process if a signal comes outside training while the main thread waits in native code, for another
        rank for example, where no Python handler runs. Runs in a thread of its own.
        """
        while received := wakeups.recv(1):
            time.sleep(SIGNAL_WAIT_S)
            is_handled = self.is_deferred or self.signalled  # by the main thread
            if not is_handled and self.process == os.getpid() and received[0] in SIGNALS:
                print(f"stopped by {signal.Signals(received[0]).name}", file=sys.stderr, flush=True)
                os._exit(EXIT_STOPPED)


@functools.cache
def _detach_forked_children() -> None:
    """Keeps the signals of a forked loader worker from waking its parent's thread."""
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


@contextmanager
def stop_on_signals(time_limit: float | None = None) -> Iterator[StopRequest]:
    """Turns SIGTERM, SIGINT and SIGUSR1 within the block into a StopRequest. time_limit: in minutes."""
    _detach_forked_children()
    request = StopRequest(time_limit)
    before: dict[signal.Signals, Any] = {number: signal.signal(number, request.on_signal) for number in SIGNALS}
    wakeups, wakeup_socket = socket.socketpair()  # Python writes each signal's number to it at once
    wakeup_socket.setblocking(False)
    outer = signal.set_wakeup_fd(wakeup_socket.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=request.exit_if_stuck, args=(wakeups,), daemon=True)
    watcher.start()
    try:
        yield request
    except Interrupted:
        before = dict.fromkeys(SIGNALS, signal.SIG_IGN)  # torchrun repeats it
        raise
    finally:
        signal.set_wakeup_fd(outer)
        wakeup_socket.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def run_entry(main: Callable[[], int | None]) -> int:
    """Runs an entry's `main` and returns its exit code. A ValueError, which a user can correct, prints one line instead
    of a traceback, and so does a signal. What reads standard output may close it early, as `| head -1` does.

    Under torchrun all ranks find the same mistake, and torchrun ends the others when the first one ends: rank 0 prints
    it, and the others give it time to.
    """
    open_closed_streams()
    try:
        with stop_on_signals():
            code = main() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except Interrupted as signal:
        print(f"stopped by {signal}", file=sys.stderr, flush=True)
        return EXIT_STOPPED
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if "site-packages" in raised_in.parts:
            raise  # a library's error that our checks missed: its traceback is needed
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        if not is_of_standard_output(error):
            raise
        return 1
    finally:
        flush_standard_output()


def answer_early(parse: Callable[[], T]) -> T:
    """Returns the parsed options, before an entry imports torch, which takes seconds: --help and options that cannot be
    used are answered at once. Exits for these.
    """
    parsed: list[T] = []
    if code := run_entry(lambda: parsed.append(parse())):
        sys.exit(code)
    return parsed[0]
