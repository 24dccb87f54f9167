"""What stands around a run: its output directory, its log and metrics, Weights & Biases without a network, and how
an entry ends.
"""

import errno
import json
import logging
import os
import re
import signal
import socket
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
import wandb

import utils
from arguments import parse_train_args
from resume import prepare_output_dir
from stopping import SIGNALS, Interrupted
from utils import (
    BackgroundThread,
    RunLog,
    Stopwatch,
    TimedIterator,
    can_compile,
    check_compiler,
    describe_environment,
    ended_before_restart,
    format_metrics,
    lock_output_dir,
    run_entry,
    setup_logging,
    write_status,
)

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


def row(step, **changes):
    figures = {"loss": 2.5, "kl": 1.25, "ce": 2.375, "lr": 1e-5, "grad_norm": 0.5, "tokens": 64 * step}
    speed = {"tokens_per_s": 12345.6, "step_time_s": 0.1, "teacher_wait_s": 0.02}
    return {"step": step, "micro_step": 2 * step, **figures, **speed, **changes}


def options(folder, *more):
    return parse_train_args(["--output_dir", str(folder), *more])


def refuse_constant(text):
    raise AssertionError(f"{text} is not JSON")


def rows_of(folder):
    """As a strict reader takes them: NaN and Infinity are Python's own and not JSON."""
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse_constant) for line in text.splitlines()]


# --- the output directory ------------------------------------------------------------------------------------


@pytest.fixture
def prepare():
    """prepare_output_dir, whose lock is given back at the end of the test. `start`: the step of the checkpoint that
    the run goes on from, if any.
    """
    locks = []

    def prepare(folder, start=None, *more):
        candidates = [] if start is None else [folder / f"checkpoint-{start}"]
        locks.append(prepare_output_dir(options(folder, *more), candidates))
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
    lock_output_dir(str(tmp_path)).close()  # who is refused holds no lock


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
    prepare(tmp_path)


def test_two_runs_do_not_write_to_one_directory(tmp_path, prepare):
    lock = prepare(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"--output_dir {tmp_path}: another run is writing there")):
        prepare(tmp_path)
    lock.close()
    prepare(tmp_path)


def test_a_run_that_was_killed_holds_no_lock(tmp_path, prepare):
    code = "import sys, time, utils; lock = utils.lock_output_dir(sys.argv[1]); "
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


# --- rows of steps -------------------------------------------------------------------------------------------


def test_rows_are_on_the_disk_as_soon_as_they_are_written(tmp_path):
    with RunLog(options(tmp_path), 0, is_main=True) as log:
        for step in (1, 2):
            log.write(row(step))
            assert rows_of(tmp_path) == [row(n) for n in range(1, step + 1)]  # while the file is open


def test_a_run_that_goes_on_appends_and_sets_aside_what_it_takes_again(tmp_path):
    with RunLog(options(tmp_path), 0, is_main=True) as log:
        for step in (1, 2, 3):
            log.write(row(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "mic')  # the run died while it wrote
    with RunLog(options(tmp_path), row(2)["micro_step"], is_main=True) as log:
        assert rows_of(tmp_path) == [row(1), row(2)]
        log.write(row(3, loss=1.5))
    assert rows_of(tmp_path) == [row(1), row(2), row(3, loss=1.5)]
    first, cut_short = (tmp_path / "metrics.abandoned.jsonl").read_text().splitlines()
    assert json.loads(first) == row(3) and cut_short == '{"step": 4, "mic'


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_a_skipped_float16_step_is_valid_json_too(tmp_path, norm):
    """`update` returns such a norm when the loss scale overflowed; a bad step's loss is such, too."""
    with RunLog(options(tmp_path), 0, is_main=True) as log:
        log.write(row(1, grad_norm=norm))
        log.write(row(2, loss=norm))
    first, second = rows_of(tmp_path)
    assert (first["loss"], first["grad_norm"]) == (2.5, None)
    assert (second["loss"], second["grad_norm"]) == (None, 0.5)


SPOILT = {
    "cut short": '{"step": 2, "micro_step": 4',
    "zeros, as a loss of power leaves": "\0" * 40,
    "no row": "[1, 2]\n",
    "a row without its place": '{"step": 2}\n',
    "another's line": "hello\n",
    "no text": b"\xff\xfe\xfa\n",
    "an empty line": "\n",
}


@pytest.mark.parametrize("spoilt", SPOILT.values(), ids=SPOILT)
def test_spoilt_lines_are_set_aside(tmp_path, spoilt):
    """Whatever stands among the rows or behind them, every line of metrics.jsonl is a row when a run goes on."""
    spoilt = spoilt if isinstance(spoilt, bytes) else spoilt.encode()
    lines = [json.dumps(row(step)).encode() + b"\n" for step in (1, 2)]
    content = b"".join([lines[0], spoilt, *([lines[1]] if spoilt.endswith(b"\n") else [])])
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with RunLog(options(tmp_path), 4, is_main=True) as log:
        log.write(row(3))
    kept = [row(1), row(2), row(3)] if spoilt.endswith(b"\n") else [row(1), row(3)]
    assert rows_of(tmp_path) == kept
    assert (tmp_path / "metrics.abandoned.jsonl").read_text() == spoilt.decode(errors="replace")


def test_what_was_set_aside_before_is_kept(tmp_path):
    for step in (1, 2):
        with RunLog(options(tmp_path), 0, is_main=True) as log:
            log.write(row(step))
    with RunLog(options(tmp_path), 0, is_main=True):
        pass
    abandoned = (tmp_path / "metrics.abandoned.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in abandoned] == [row(1), row(2)]
    assert rows_of(tmp_path) == []


class FullDisk:
    """A file that takes `room` bytes, and then raises until there is room again."""

    def __init__(self, file, room):
        self.file, self.room, self.closed = file, room, False

    def write(self, data):
        taken = min(len(data), self.room)
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= taken
        return self.file.write(data[:taken])

    def fileno(self):
        return self.file.fileno()

    def close(self):
        self.file.close()
        self.closed = True


@pytest.mark.parametrize("room", [0, 30, 500])
def test_rows_that_a_full_disk_does_not_take_are_kept(tmp_path, capsys, room):
    """In order, whole, and none twice; one warning tells it."""
    setup_logging(None, is_main=True)
    with RunLog(options(tmp_path, "--log_interval", "100"), 0, is_main=True) as log:
        log.file = disk = FullDisk(log.file, room)
        for step in range(1, 7):
            log.write(row(step))
            log.flush_to_disk()
        on_disk = (tmp_path / "metrics.jsonl").read_bytes()
        assert len(on_disk) == room
        assert capsys.readouterr().err.count("metrics.jsonl cannot be written (No space left on device)") == 1
        disk.room = 10**6
        log.write(row(7))
        assert rows_of(tmp_path) == [row(step) for step in range(1, 8)]
        disk.room = 0
        log.write(row(8))
        assert capsys.readouterr().err.count("metrics.jsonl cannot be written") == 1  # it happened anew
        disk.room = 10**6
    assert rows_of(tmp_path) == [row(step) for step in range(1, 9)]  # the end of the run is a last try
    assert disk.closed


def test_a_disk_that_stays_full_does_not_end_the_run(tmp_path):
    with RunLog(options(tmp_path), 0, is_main=True) as log:
        log.file = disk = FullDisk(log.file, 0)
        log.write(row(1))
    assert disk.closed and (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_other_ranks_write_nothing(tmp_path, capsys):
    with RunLog(options(tmp_path, "--wandb", "--local_files_only"), 0, is_main=False) as log:
        log.write(row(1))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_first_and_every_nth_step_are_logged(tmp_path, capsys):
    setup_logging(None, is_main=True)
    with RunLog(options(tmp_path, "--log_interval", "3"), 0, is_main=True) as log:
        for step in range(1, 8):
            log.write(row(step))
    shown = capsys.readouterr().err.splitlines()
    assert shown == [f"[train] {format_metrics(row(step))}" for step in (1, 3, 6)]
    assert len(rows_of(tmp_path)) == 7


def test_the_line_of_a_step():
    assert format_metrics(row(3, loss=1.23456, lr=9.87e-6, grad_norm=12.345)) == (
        "micro_step 6 (opt 3) | loss 1.2346 | kl 1.2500 | ce 2.3750 | lr 9.87e-06 | grad 12.35 | "
        "tok/s 12,346 | teacher wait 0.02s"
    )


# --- Weights & Biases ----------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch):
    """No socket of this process leaves the machine, and W&B's own process finds nobody but our ear. Returns it: a
    listening socket that nobody should call.
    """
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise AssertionError(f"a connection to {address}")
        return connect(self, address)

    with socket.create_server(("127.0.0.1", 0)) as ear:
        ear.setblocking(False)
        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{ear.getsockname()[1]}")
        monkeypatch.setenv("WANDB_SILENT", "true")
        for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
            monkeypatch.delenv(name, raising=False)
        yield ear


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_wandb_without_a_network(tmp_path, no_network, mode):
    args = options(tmp_path, "--wandb", "--local_files_only", "--wandb_run_name", "mine")
    args.wandb_mode = None if mode == "offline" else mode  # offline follows from --local_files_only
    with RunLog(args, 0, is_main=True) as log:
        log.write(row(1))
        log.write(row(2))
    assert rows_of(tmp_path) == [row(1), row(2)]
    wandb.teardown()  # as at the end of a process: W&B's own one writes what it still holds
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == (1 if mode == "offline" else 0)
    if files:
        content = files[0].read_bytes()
        assert b"llamba-distill" in content and b"mine" in content
        assert b"grad_norm" in content and b"seq_length" in content  # rows, and the run's options
    with pytest.raises(BlockingIOError):
        no_network.accept()


def test_without_wandb_it_is_not_even_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with RunLog(options(tmp_path), 0, is_main=True) as log:
        log.write(row(1))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class Finished:
    """A W&B run that remembers how it ended."""

    exit_code = None

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.mark.parametrize("error,exit_code", [(None, 0), (KeyboardInterrupt, 1)])
def test_wandb_is_told_how_the_run_ended(tmp_path, monkeypatch, error, exit_code):
    run = Finished()
    monkeypatch.setattr(utils, "_start_wandb", lambda args, folder: run)

    def work():
        with RunLog(options(tmp_path, "--wandb"), 0, is_main=True):
            if error:
                raise error

    if error:
        with pytest.raises(error):
            work()
    else:
        work()
    assert run.exit_code == exit_code


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


# --- status.json ---------------------------------------------------------------------------------------------


def test_the_status_of_a_run(tmp_path):
    write_status(tmp_path, "running", 0)
    assert json.loads((tmp_path / "status.json").read_text()) == {"status": "running", "exit_code": 0}
    write_status(tmp_path, "stopped", 75, micro_step=8, text="stopped by SIGTERM")
    expected = {"status": "stopped", "exit_code": 75, "micro_step": 8, "text": "stopped by SIGTERM"}
    assert json.loads((tmp_path / "status.json").read_text()) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_status_that_cannot_be_written_is_told_and_no_more(tmp_path, capsys):
    setup_logging(None, is_main=True)
    write_status(tmp_path / "absent", "running", 0)
    assert "status.json cannot be written (No such file or directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "restarts,status,code",
    [
        (None, "stopped", None),  # not under torchrun
        ("0", "stopped", None),  # started anew, by somebody who knows
        ("1", "stopped", 75),
        ("3", "diverged", 76),
        ("1", "running", None),  # it died
        ("1", "complete", None),
        ("1", None, None),
    ],
)
def test_workers_that_ended_for_good_are_not_started_again(tmp_path, monkeypatch, restarts, status, code):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    if status is not None:
        codes = {"stopped": 75, "diverged": 76}
        write_status(tmp_path, status, codes.get(status, 0), **({"text": "why"} if status in codes else {}))
    assert ended_before_restart(tmp_path) == code


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
    monkeypatch.setattr(utils, "time", SimpleNamespace(sleep=seconds.append))  # other threads may sleep
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
    assert capsys.readouterr() == ("", f"stopped by {name} with nothing to save\n")


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
    monkeypatch.setattr("utils.shutil.which", lambda name: name if name in programs else None)
    monkeypatch.setattr("utils.importlib.util.find_spec", lambda name: object() if has_triton else None)
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
