"""Logging, locks, clocks, the background thread and the thread that draws ahead."""

import logging
import os
import threading
import time
import weakref

import pytest
import torch
import transformers

import utils
from tests.text.documents import ahead_threads
from tests.waiting import wait_until
from utils import BackgroundThread, Stopwatch, TimedIterator, describe_environment, run_ahead, setup_logging

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


# --- locks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["link", "link to nowhere", "hard", "folder", "pipe"])
def test_a_lock_that_is_no_file_of_ours_is_one_line_and_stays(tmp_path, kind):
    """A link was followed, and what it pointed to was emptied."""
    (tmp_path / "precious").write_text("kept")
    lock = tmp_path / "run" / ".lock"
    lock.parent.mkdir()
    if "link" in kind:
        lock.symlink_to(tmp_path / ("precious" if kind == "link" else "nowhere"))
    elif kind == "hard":
        lock.hardlink_to(tmp_path / "precious")
    elif kind == "folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    with pytest.raises(ValueError, match=f"--output_dir {lock.parent}: .lock in it is no plain file.*; remove it"):
        utils.lock_dir("--output_dir", lock.parent)
    assert (tmp_path / "precious").read_text() == "kept" and not (tmp_path / "nowhere").exists()


def test_a_link_that_is_made_between_the_check_and_the_opening_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    monkeypatch.setattr("pathlib.Path.is_symlink", lambda path: False)
    with pytest.raises(ValueError, match=f"--output_dir {tmp_path}: cannot be written"):
        utils.lock_dir("--output_dir", tmp_path)
    assert (tmp_path / "precious").read_text() == "kept"


def test_who_does_not_get_the_lock_leaves_what_the_other_has_written_in_it(tmp_path):
    with utils.lock_dir("--output_dir", tmp_path) as lock:
        lock.write("mine")
        lock.flush()
        with pytest.raises(ValueError, match="another run is writing there"):
            utils.lock_dir("--output_dir", tmp_path)
        assert (tmp_path / ".lock").read_text() == "mine"
    with utils.lock_dir("--output_dir", tmp_path):
        assert (tmp_path / ".lock").read_text() == ""


def test_a_whole_file_is_never_written_through_a_link(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / f".{os.getpid()}-{threading.get_native_id()}.partial").symlink_to(tmp_path / "precious")
    utils.write_whole(tmp_path / "new", b"content")
    assert (tmp_path / "precious").read_text() == "kept" and (tmp_path / "new").read_text() == "content"


# --- clocks --------------------------------------------------------------------------------------------------


def test_a_stopwatch_gives_the_time_of_each_lap(monkeypatch):
    times = iter([10.0, 12.5, 13.0])
    monkeypatch.setattr(utils.time, "perf_counter", lambda: next(times))
    watch = Stopwatch()
    assert [watch.lap(), watch.lap()] == [2.5, 0.5]


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


def test_a_peek_takes_nothing():
    drawn = []
    items = TimedIterator(drawn.append(i) or i for i in range(3))
    assert items.peek() == 0 and items.peek() == 0 and drawn == [0]
    assert list(items) == [0, 1, 2] and items.peek() is None


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


# --- a thread that draws ahead -------------------------------------------------------------------------------


def test_run_ahead_draws_before_it_is_asked_but_not_without_bound():
    drawn = []
    ahead = run_ahead((drawn.append(i) or i for i in range(100)), depth=4)
    assert next(ahead) == 0
    wait_until(lambda: len(drawn) >= 6)  # one taken, four waiting, one in hand
    time.sleep(0.2)
    assert len(drawn) == 6
    assert list(ahead) == list(range(1, 100))
    assert ahead_threads() == 0


def test_run_ahead_raises_the_threads_error_after_what_came_before():
    def items():
        yield 1
        raise ValueError("row 7")

    ahead = run_ahead(items(), depth=4)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="row 7"):
        next(ahead)
    assert ahead_threads() == 0


def test_run_ahead_ends_its_thread_when_the_consumer_breaks_off():
    for i in run_ahead(iter(range(10**9)), depth=2):
        if i == 3:
            break
    assert ahead_threads() == 0
