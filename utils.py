"""The logger, files, threads and clocks that everything else uses. Imports torch only where it is needed."""

import fcntl
import hashlib
import itertools
import logging
import math
import os
import platform
import queue
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, TypeVar

from appended_file import LogFile

logger = logging.getLogger("train")

T = TypeVar("T")


def setup_logging(log_file: str | None, is_main: bool) -> None:
    """Logs lines as `[train] ...` to standard error and `log_file`: all of the main rank, warnings of the others."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    formatter = logging.Formatter("[%(name)s] %(message)s")
    handlers: list[logging.Handler] = [Screen(sys.stderr)]
    if log_file and is_main:
        try:
            handlers.append(LogFile(Path(log_file)))
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


class Screen(logging.StreamHandler):
    """Writes lines to standard error, and nothing about a line that it does not take: a terminal that is gone or a full
    disk behind it ends no run.
    """

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is logging's)
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def describe_environment() -> str:
    """Returns versions, devices and NCCL settings in one line."""
    import torch
    import transformers

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


def boot_id() -> str:
    """Returns what the kernel chose at random when the machine was booted, or nothing where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class TakenError(ValueError):
    """Says that another process has locked a directory."""


def lock_dir(flag: str, directory: str | Path) -> IO[str]:
    """Creates the directory and locks it for this process, until the lock is closed. Raises ValueError if it cannot be
    written, TakenError if another run holds it.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        lock = _open_lock(flag, Path(directory) / ".lock")
    except OSError as error:
        raise ValueError(
            f"{flag} {directory}: cannot be written ({error.strerror}); choose a directory of your own"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TakenError(
            f"{flag} {directory}: another run is writing there; wait for its end, or choose another directory"
        ) from error
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s %s cannot be locked (%s): start no second run there", flag, directory, error.strerror)
    lock.truncate(0)  # only now: until then it may be another run's
    return lock


def _open_lock(flag: str, file: Path) -> IO[str]:
    """Opens a lock file, made if missing. Raises ValueError for a link, and whatever else a run does not make."""
    foreign = ValueError(f"{flag} {file.parent}: {file.name} in it is no plain file but a link or the like; remove it")
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise foreign
    # O_NOFOLLOW: a link may have been made since.
    lock = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "r+")
    if os.fstat(lock.fileno()).st_nlink > 1:  # a file of another name too, which would be emptied
        lock.close()
        raise foreign
    return lock


def write_whole(path: Path, content: bytes) -> None:
    """Writes the whole file or nothing of it, even if the power fails."""
    temporary = path.with_name(f".{os.getpid()}-{threading.get_native_id()}.partial")  # threads write to one folder
    temporary.unlink(missing_ok=True)  # it may be a link to another file
    try:
        temporary.write_bytes(content)
        flush_to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """Returns the value with None for infinity and NaN, inside dicts and lists too, because JSON has neither."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text: str) -> str:
    """Returns the text on one line: line ends, control characters and halves of surrogate pairs, which a terminal would
    obey or a file could not hold, become escapes such as \\n.
    """
    is_shown = (character.isprintable() or unicodedata.category(character) == "Zs" for character in text)
    pairs = zip(text, is_shown, strict=True)
    return "".join(c if shown else c.encode("unicode_escape").decode() for c, shown in pairs)


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or a directory's entries, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """Returns the hash of a file, of which a block is in memory at a time."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def format_duration(seconds: float) -> str:
    """Returns a time such as 90 s, 100 min, 12 h 34 min, 3 d 2 h, for text that is read once."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 120:
        return f"{seconds:.3g} s"
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


class BackgroundThread:
    """Runs jobs in order in one thread. It ends with the process: a job that hangs because another rank died
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
            del item, future, job  # they hold an answer, which may be large, until the next job comes


def in_background(name: str, job: Callable[[], T]) -> "Future[T]":
    """Runs one job in a thread of its own, which ends with the process."""
    thread = BackgroundThread(name)
    result = thread.submit(job)
    thread.jobs.put(None)
    return result


class Stopwatch:
    """Measures the seconds since it was made or last read."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        elapsed, self.start = now - self.start, now
        return elapsed


class TimedIterator(Iterator[T]):
    """Yields another iterator's items and counts the seconds that the caller waits for them."""

    def __init__(self, items: Iterable[T]) -> None:
        self.items: Iterator[T] = iter(items)
        self.seconds = 0.0

    def __next__(self) -> T:
        start = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - start

    def peek(self) -> T | None:
        """Returns the next item without taking it, or None at the end. Nobody counts as waiting for it."""
        first = next(self.items, None)
        if first is not None:
            self.items = itertools.chain([first], self.items)
        return first

    def take(self) -> float:
        """Returns the seconds waited since the last call."""
        taken, self.seconds = self.seconds, 0.0
        return taken


def run_ahead(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Draws `items` in a thread, up to `depth` ahead. Its errors are raised here; closing this generator ends it."""
    ready: queue.Queue[T | Exception | None] = queue.Queue(depth)
    stop = threading.Event()

    def offer(item: T | Exception | None) -> bool:
        # the main thread may also end without closing us, and then nobody will ever take what we offer
        while not stop.is_set() and threading.main_thread().is_alive():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not offer(item):
                    return
        except Exception as error:  # handed over, not hidden
            offer(error)
        else:
            offer(None)

    thread = threading.Thread(target=produce, name="run-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(timeout=10)  # it may be waiting for a lost connection, which must not keep the process
