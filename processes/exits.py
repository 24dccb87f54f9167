"""Stopping on request. A signal or the time limit asks; training asks back between micro steps, so that it can end
what it is in and save. Outside training there is nothing to save, and a signal ends the program where it is.
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
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REASONS = ("", *(s.name for s in SIGNALS), "--time_limit")  # by the code that the ranks agree on

# What a batch script can tell an ended process by. 0: the run is complete. 2: an option or input has to be corrected.
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: start it again with --resume auto
EXIT_DIVERGED = 76

PATIENCE_S = 3.0  # for the main thread to hear a signal by itself


class Interrupted(BaseException):
    """A signal outside training; its text is the signal's name. Nothing but `run_entry` should catch it."""


class StopRequest:
    """Whether this process has been asked to stop, as an index into REASONS."""

    def __init__(self, time_limit: float | None) -> None:
        """time_limit: minutes from now."""
        self.deadline = None if time_limit is None else time.monotonic() + 60 * time_limit
        self.process = os.getpid()
        self.signalled = 0
        self.deferred = False

    def count_from(self, launched: float) -> None:
        """Has the time limit begin at `launched`, in seconds since the epoch."""
        if self.deadline is not None:
            self.deadline -= time.time() - launched

    @property
    def code(self) -> int:
        late = self.deadline is not None and time.monotonic() > self.deadline
        return self.signalled or (len(REASONS) - 1 if late else 0)

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Within, a signal only sets `code`; so it does after an error, whose own way out it must not cut short."""
        self.deferred = True
        yield
        self.deferred = False

    def hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a forked loader worker: it has its parent's handlers, not its duties
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.signalled = SIGNALS.index(signal.Signals(number)) + 1
        if not self.deferred:
            raise Interrupted(REASONS[self.signalled])

    def see_to_it(self, bell: socket.socket) -> None:
        """For a thread of its own: ends the process where a signal outside training finds its main thread waiting in
        native code, for another rank say, from which no exception can take it.
        """
        while rung := bell.recv(1):
            time.sleep(PATIENCE_S)
            heard = self.deferred or self.signalled  # by the main thread, which sees to its end itself
            if not heard and self.process == os.getpid() and rung[0] in SIGNALS:
                print(f"stopped by {signal.Signals(rung[0]).name}", file=sys.stderr, flush=True)
                os._exit(EXIT_STOPPED)


@functools.cache
def _children_are_deaf() -> None:
    """A forked loader worker's signals must not ring its parent's bell."""
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))


@contextmanager
def hearing_signals(time_limit: float | None = None) -> Iterator[StopRequest]:
    _children_are_deaf()
    request = StopRequest(time_limit)
    before: dict[signal.Signals, Any] = {number: signal.signal(number, request.hear) for number in SIGNALS}
    bell, rope = socket.socketpair()  # Python writes each signal's number to it at once
    rope.setblocking(False)
    outer = signal.set_wakeup_fd(rope.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=request.see_to_it, args=(bell,), daemon=True)
    watcher.start()
    try:
        yield request
    except Interrupted:
        before = dict.fromkeys(SIGNALS, signal.SIG_IGN)  # torchrun repeats it, and it has been heard
        raise
    finally:
        signal.set_wakeup_fd(outer)
        rope.close()
        for number, handler in before.items():
            signal.signal(number, handler)


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
        print(f"stopped by {signal}", file=sys.stderr, flush=True)
        return EXIT_STOPPED
    except ValueError as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if "site-packages" in raised_in.parts:
            raise  # a library's, which no check of ours foresaw: where it happened matters
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def answer_early(parse: Callable[[], Any]) -> None:
    """Exits for --help and for options that cannot be used, before an entry imports torch, which takes seconds."""

    def check() -> None:
        parse()

    if code := run_entry(check):
        sys.exit(code)
