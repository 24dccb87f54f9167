"""What stands around a run: its output directory, its logger, threads and clocks, and how an entry ends."""

import errno
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import utils
from arguments import parse_train_args
from checkpointing.run_folder import prepare_output_dir
from processes import exits
from processes.devices import can_compile, check_compiler
from processes.exits import SIGNALS, Interrupted, run_entry
from utils import BackgroundThread, Stopwatch, TimedIterator, describe_environment, lock_dir, setup_logging

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def own_loggers():
    """Tests that set logging up leave it as it was."""
    logs = [logging.getLogger(name) for name in ("train", "llamba")]
    before = [(log.handlers[:], log.level, log.propagate) for log in logs]
    yield
    for log, (handlers, level, propagate) in zip(logs, before, strict=True):
        for handler in set(log.handlers) - set(handlers):
            handler.close()
        log.handlers[:], log.level, log.propagate = handlers, level, propagate


def options(folder, *more):
    return parse_train_args(["--output_dir", str(folder), *more])


# --- the output directory ------------------------------------------------------------------------------------


@pytest.fixture
def prepare():
    """prepare_output_dir, whose lock is given back at the end of the test. `start`: the step of the checkpoint that
    the run resumes from, if any.
    """
    locks = []

    def prepare(folder, start=None, *more):
        checkpoint = None if start is None else folder / f"checkpoint-{start}"
        locks.append(prepare_output_dir(options(folder, *more), checkpoint))
        return locks[-1]

    yield prepare
    for lock in locks:
        lock.close()


def names(folder):
    """All but the lock, which no glob of a user finds."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_fresh_output_directory(tmp_path, prepare):
    folder = tmp_path / "a" / "b"
    prepare(folder).close()
    assert folder.is_dir() and names(folder) == []
    prepare(folder)  # it may exist


def test_an_output_directory_that_cannot_be_written(tmp_path, prepare):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=re.escape(f"--output_dir {path}: cannot be written (")):
            prepare(path)


@pytest.mark.parametrize(
    "steps,start,line",
    [
        ([0], None, ""),
        ([30], None, ""),
        ([10, 30], None, "--resume_step 10"),
        ([30], None, "--resume_step 10"),
        ([0, 11], None, "--resume_step 10"),
        ([10, 30], 10, "--resume checkpoint-10"),
        ([0, 10], 0, "--resume checkpoint-0"),
    ],
)
def test_results_of_another_run_are_not_overwritten(tmp_path, prepare, steps, start, line):
    for step in steps:
        (tmp_path / f"checkpoint-{step}").mkdir()
    before = names(tmp_path)
    with pytest.raises(ValueError) as error:
        prepare(tmp_path, start, *line.split())
    message = str(error.value)
    assert f"--output_dir {tmp_path}: holds checkpoints up to checkpoint-{max(steps)}, " in message
    assert "--resume auto" in message
    assert names(tmp_path) == before
    lock_dir("--output_dir", tmp_path).close()  # who is refused holds no lock


@pytest.mark.parametrize(
    "steps,start,line",
    [
        *((steps, None, "--resume_step 10") for steps in ([], [0], [0, 5], [10], [0, 5, 10])),
        *((steps, 10, "--resume auto") for steps in ([], [0], [0, 5], [10], [0, 5, 10])),
        ([0], 0, "--resume auto"),
    ],
)
def test_a_run_goes_on_where_its_own_checkpoints_are(tmp_path, prepare, steps, start, line):
    for step in steps:
        (tmp_path / f"checkpoint-{step}").mkdir()
    prepare(tmp_path, start, *line.split())
    assert len(names(tmp_path)) == len(steps)


def test_newer_checkpoints_that_are_bad_and_what_dead_saves_left_are_out_of_the_way(tmp_path, prepare):
    for name in ("checkpoint-10", "checkpoint-20", "checkpoint-30", ".partial-checkpoint-40-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    prepare(tmp_path, 10, "--resume", "auto")
    assert names(tmp_path) == ["bad-checkpoint-20", "bad-checkpoint-30", "checkpoint-10"]
    assert all((tmp_path / name / "file").exists() for name in names(tmp_path))


def test_a_checkpoint_that_was_moved_aside_is_not_in_the_way(tmp_path, prepare):
    (tmp_path / "checkpoint-30.old").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "bad-checkpoint-30").mkdir()
    assert not prepare(tmp_path).closed  # the lock is held


def test_two_runs_do_not_write_to_one_directory(tmp_path, prepare):
    lock = prepare(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"--output_dir {tmp_path}: another run is writing there")):
        prepare(tmp_path)
    lock.close()
    prepare(tmp_path)


def test_a_run_that_was_killed_holds_no_lock(tmp_path, prepare):
    code = "import sys, time, utils; lock = utils.lock_dir('--output_dir', sys.argv[1]); "
    code += "print('held', flush=True); time.sleep(600)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another run is writing there"):
            prepare(tmp_path)
        process.kill()
        process.wait()
        prepare(tmp_path)


def test_a_disk_without_locks_is_no_hindrance(tmp_path, prepare, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    setup_logging(None, is_main=True)
    monkeypatch.setattr(utils.fcntl, "flock", refuse)
    prepare(tmp_path)
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


# --- logging -------------------------------------------------------------------------------------------------


def test_the_main_rank_speaks_and_writes_its_log_file(tmp_path, capsys):
    file = tmp_path / "logs" / "run.txt"
    setup_logging(str(file), is_main=True)
    logging.getLogger("train").info("a line")
    logging.getLogger("llamba").warning("another")
    expected = "[train] a line\n[llamba] another\n"
    assert capsys.readouterr() == ("", expected)
    assert file.read_text() == expected


def test_other_ranks_only_warn(tmp_path, capsys):
    setup_logging(str(tmp_path / "logs" / "run.txt"), is_main=False)
    logging.getLogger("train").info("a line")
    logging.getLogger("train").warning("mind this")
    assert capsys.readouterr().err == "[train] mind this\n"
    assert list(tmp_path.iterdir()) == []


def test_setting_up_twice_does_not_say_things_twice(capsys):
    for _ in range(2):
        setup_logging(None, is_main=True)
    logging.getLogger("train").info("once")
    assert capsys.readouterr().err == "[train] once\n"


def test_the_environment_in_one_line(monkeypatch):
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    line = describe_environment()
    assert "\n" not in line
    assert f"torch {torch.__version__} | transformers {transformers.__version__} | GPUs Card 0, Card 1" in line
    assert line.endswith("NCCL_P2P_DISABLE=1 | TORCH_NCCL_BLOCKING_WAIT=0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "GPUs none" in describe_environment()


def test_a_stopwatch_gives_the_time_of_each_lap(monkeypatch):
    times = iter([10.0, 12.5, 13.0])
    monkeypatch.setattr(utils.time, "perf_counter", lambda: next(times))
    watch = Stopwatch()
    assert [watch.lap(), watch.lap()] == [2.5, 0.5]


# --- a thread for one job after the other --------------------------------------------------------------------


@pytest.fixture
def thread():
    thread = BackgroundThread("worker")
    yield thread
    thread.close()
    assert not thread.thread.is_alive()


def test_jobs_are_done_in_order_in_a_thread_that_ends_with_the_process(thread):
    done = []
    futures = [thread.submit(lambda n=n: done.append(n) or (n, threading.current_thread().name)) for n in range(20)]
    assert [future.result(timeout=10) for future in futures] == [(n, "worker") for n in range(20)]
    assert done == list(range(20)) and thread.thread.daemon


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt("now"), SystemExit(3)])
def test_a_job_that_fails_raises_where_it_is_asked_for_and_the_next_is_done(thread, error):
    def fail():
        raise error

    failed, good = thread.submit(fail), thread.submit(lambda: 7)
    assert good.result(timeout=10) == 7
    assert failed.exception(timeout=10) is error


def test_nothing_holds_what_a_job_has_made(thread):
    class Large:
        pass

    future = thread.submit(Large)
    made = weakref.ref(future.result(timeout=10))
    thread.submit(lambda: None).result(timeout=10)
    assert made() is not None
    del future
    assert made() is None


def test_closing_waits_for_what_was_submitted():
    thread, done = BackgroundThread("worker"), []
    for n in range(3):
        thread.submit(lambda n=n: time.sleep(0.02) or done.append(n))
    thread.close()
    assert done == [0, 1, 2]


# --- how an entry ends ---------------------------------------------------------------------------------------


@pytest.fixture
def slept(monkeypatch):
    """Seconds that were asked for, none of which pass."""
    seconds = []
    monkeypatch.setattr(exits, "time", SimpleNamespace(sleep=seconds.append))  # other threads may sleep
    monkeypatch.delenv("RANK", raising=False)
    return seconds


def refuse_layers():
    raise ValueError("--layers 1 9: out of range")


def test_an_entry_that_ends_well(slept, capsys):
    assert run_entry(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("code", [0, 1, 75, 76])
def test_the_code_of_main_is_the_entrys(slept, capsys, code):
    assert run_entry(lambda: code) == code
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def handlers():
    """Of signals, as they were afterwards: a program that ends by one is deaf to those that follow."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_an_entry_with_one_line(capsys, handlers, name):
    def main():
        signal.raise_signal(getattr(signal, name))
        pytest.fail("it went on")

    assert run_entry(main) == 75
    assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}  # torchrun may send it again
    signal.raise_signal(getattr(signal, name))
    assert capsys.readouterr() == ("", f"stopped by {name}\n")


def test_an_entry_that_ends_well_leaves_signals_as_they_were():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    assert run_entry(lambda: 0) == 0
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_a_signal_is_not_taken_for_an_error_on_its_way_out(handlers):
    """Code that catches every Exception and goes on would lose it."""

    def main():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("caught as an Exception")

    assert run_entry(main) == 75
    assert not issubclass(Interrupted, Exception)


def test_what_a_user_can_put_right_is_one_line(slept, capsys):
    assert run_entry(refuse_layers) == 2
    assert capsys.readouterr() == ("", "error: --layers 1 9: out of range\n")
    assert slept == []


@pytest.mark.parametrize("rank,waits", [("0", False), ("1", True), ("3", True)])
def test_rank_0_is_given_time_to_speak(slept, monkeypatch, rank, waits):
    monkeypatch.setenv("RANK", rank)
    assert run_entry(refuse_layers) == 2
    assert bool(slept) is waits
    assert all(seconds >= 5 for seconds in slept)


@pytest.mark.parametrize("error", [FloatingPointError, RuntimeError, KeyError, KeyboardInterrupt])
def test_other_errors_keep_their_traceback(slept, error):
    def main():
        raise error("deep inside")

    with pytest.raises(error, match="deep inside"):
        run_entry(main)
    assert slept == []


# --- what torch.compile needs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device_type,programs,has_triton,expected",
    [
        ("cpu", {"g++"}, False, True),
        ("cpu", {"gcc"}, True, False),
        ("cuda", {"gcc"}, True, True),
        ("cuda", {"gcc"}, False, False),
        ("cuda", set(), True, False),
    ],
)
def test_a_missing_compiler_is_told_before_a_run(monkeypatch, device_type, programs, has_triton, expected):
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("processes.devices.shutil.which", lambda name: name if name in programs else None)
    monkeypatch.setattr("processes.devices.importlib.util.find_spec", lambda name: object() if has_triton else None)
    can_compile.cache_clear()
    try:
        assert can_compile(device_type) is expected
        if not expected:
            with pytest.raises(ValueError, match="--compile: torch.compile needs .*, not found here"):
                check_compiler(device_type)
    finally:
        can_compile.cache_clear()


def test_a_timed_iterator_counts_the_waiting_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("utils.time.perf_counter", lambda: now[0])

    def slow():
        for item in "ab":
            now[0] += 3.0
            yield item

    items = TimedIterator(slow())
    seen = []
    for item in items:
        seen.append(item)
        now[0] += 5.0
    assert seen == ["a", "b"] and items.take() == 6.0 and items.take() == 0


@pytest.mark.parametrize(
    "seconds,text",
    [
        (0.5, "0.5 s"),
        (119, "119 s"),
        (120, "2 min"),
        (5400, "90 min"),
        (7500, "2 h 05 min"),
        (86400 * 3 + 3600 * 5, "3 d 5 h"),
    ],
)
def test_durations(seconds, text):
    assert utils.format_duration(seconds) == text
