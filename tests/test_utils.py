"""What stands around a run: its output directory, its log and metrics, Weights & Biases without a network, and how
an entry ends.
"""

import json
import logging
import re
import socket
import sys

import pytest
import torch
import transformers
import wandb

import utils
from arguments import parse_train_args
from utils import (
    RunLog,
    Stopwatch,
    TimedIterator,
    can_compile,
    check_compiler,
    describe_environment,
    format_metrics,
    prepare_output_dir,
    run_entry,
    setup_logging,
)


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


def test_a_fresh_output_directory(tmp_path):
    folder = tmp_path / "a" / "b"
    assert prepare_output_dir(str(folder), 0) == folder
    assert folder.is_dir() and list(folder.iterdir()) == []
    assert prepare_output_dir(str(folder), 0) == folder  # it may exist


def test_an_output_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=re.escape(f"--output_dir {path}: cannot be written (")):
            prepare_output_dir(str(path), 0)


@pytest.mark.parametrize("steps,resume_step", [([0], 0), ([30], 0), ([10, 30], 10), ([30], 10), ([0, 11], 10)])
def test_results_of_another_run_are_not_overwritten(tmp_path, steps, resume_step):
    for step in steps:
        (tmp_path / f"checkpoint-{step}").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError) as error:
        prepare_output_dir(str(tmp_path), resume_step)
    assert f"--output_dir {tmp_path}: holds checkpoints up to checkpoint-{max(steps)}, " in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("steps", [[], [0], [0, 5], [10], [0, 5, 10]])
def test_a_run_goes_on_where_its_own_checkpoints_are(tmp_path, steps):
    for step in steps:
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert prepare_output_dir(str(tmp_path), 10) == tmp_path
    assert len(list(tmp_path.iterdir())) == len(steps)


def test_a_checkpoint_that_was_moved_aside_is_not_in_the_way(tmp_path):
    (tmp_path / "checkpoint-30.old").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert prepare_output_dir(str(tmp_path), 0) == tmp_path


# --- rows of steps -------------------------------------------------------------------------------------------


def test_rows_are_on_the_disk_as_soon_as_they_are_written(tmp_path):
    with RunLog(options(tmp_path), is_main=True) as log:
        for step in (1, 2):
            log.write(row(step))
            assert rows_of(tmp_path) == [row(n) for n in range(1, step + 1)]  # while the file is open


def test_a_run_that_goes_on_appends_and_sets_aside_what_it_takes_again(tmp_path):
    with RunLog(options(tmp_path), is_main=True) as log:
        for step in (1, 2, 3):
            log.write(row(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "mic')  # the run died while it wrote
    second = options(tmp_path, "--resume_step", str(row(2)["micro_step"]))
    with RunLog(second, is_main=True) as log:
        assert rows_of(tmp_path) == [row(1), row(2)]
        log.write(row(3, loss=1.5))
    assert rows_of(tmp_path) == [row(1), row(2), row(3, loss=1.5)]
    first, cut_short = (tmp_path / "metrics.abandoned.jsonl").read_text().splitlines()
    assert json.loads(first) == row(3) and cut_short == '{"step": 4, "mic'


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_a_skipped_float16_step_is_valid_json_too(tmp_path, norm):
    """`update` returns such a norm when the loss scale overflowed."""
    with RunLog(options(tmp_path), is_main=True) as log:
        log.write(row(1, grad_norm=norm))
    assert rows_of(tmp_path)[0]["loss"] == 2.5


def test_other_ranks_write_nothing(tmp_path, capsys):
    with RunLog(options(tmp_path, "--wandb", "--local_files_only"), is_main=False) as log:
        log.write(row(1))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_first_and_every_nth_step_are_logged(tmp_path, capsys):
    setup_logging(None, is_main=True)
    with RunLog(options(tmp_path, "--log_interval", "3"), is_main=True) as log:
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
    with RunLog(args, is_main=True) as log:
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
    with RunLog(options(tmp_path), is_main=True) as log:
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
        with RunLog(options(tmp_path, "--wandb"), is_main=True):
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


# --- how an entry ends ---------------------------------------------------------------------------------------


@pytest.fixture
def slept(monkeypatch):
    """Seconds that were asked for, none of which pass."""
    seconds = []
    monkeypatch.setattr(utils.time, "sleep", seconds.append)
    monkeypatch.delenv("RANK", raising=False)
    return seconds


def refuse_layers():
    raise ValueError("--layers 1 9: out of range")


def test_an_entry_that_ends_well(slept, capsys):
    assert run_entry(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


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
