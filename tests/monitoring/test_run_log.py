"""What a run reports: its rows, however the disk fails or the run ends, lines of the log, warnings.jsonl and
status.json.
"""

import errno
import json
import logging
import os
import time

import pytest

from checkpointing.run_folder import ended_before_restart, read_status, taken, write_status
from monitoring import run_log
from monitoring.run_log import RunLog, format_metrics
from monitoring.warnings_file import recording_warnings
from tests.parsing import options_in
from utils import setup_logging


def row(step, **changes):
    figures = {"loss": 2.5, "kl": 1.25, "ce": 2.375, "lr": 1e-5, "grad_norm": 0.5, "tokens": 64 * step}
    speed = {"tokens_per_s": 12345.6, "step_time_s": 0.1, "teacher_wait_s": 0.02}
    return {"step": step, "micro_step": 2 * step, **figures, **speed, **changes}


def refuse_constant(text):
    raise AssertionError(f"{text} is not JSON")


def rows_of(folder):
    """Returns the rows as a strict reader takes them: NaN and Infinity are Python's own and not JSON."""
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse_constant) for line in text.splitlines()]


# --- rows of steps -------------------------------------------------------------------------------------------


def test_rows_are_on_the_disk_as_soon_as_they_are_written(tmp_path):
    with RunLog(options_in(tmp_path), 0, is_main=True) as log:
        for step in (1, 2):
            log.write(row(step))
            assert rows_of(tmp_path) == [row(n) for n in range(1, step + 1)]  # while the file is open


def test_a_resumed_run_appends_and_sets_aside_what_it_takes_again(tmp_path):
    with RunLog(options_in(tmp_path), 0, is_main=True) as log:
        for step in (1, 2, 3):
            log.write(row(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "mic')  # the run died while it wrote
    with RunLog(options_in(tmp_path), row(2)["micro_step"], is_main=True) as log:
        assert rows_of(tmp_path) == [row(1), row(2)]
        log.write(row(3, loss=1.5))
    assert rows_of(tmp_path) == [row(1), row(2), row(3, loss=1.5)]
    first, cut_short = (tmp_path / "metrics.abandoned.jsonl").read_text().splitlines()
    assert json.loads(first) == row(3) and cut_short == '{"step": 4, "mic'


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_a_skipped_float16_step_is_valid_json_too(tmp_path, norm):
    """`update` returns such a norm when the loss scale overflowed; a bad step's loss is such, too."""
    with RunLog(options_in(tmp_path), 0, is_main=True) as log:
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
    """In a resumed run every line of metrics.jsonl is a row, whatever stood among the rows or behind them."""
    spoilt = spoilt if isinstance(spoilt, bytes) else spoilt.encode()
    lines = [json.dumps(row(step)).encode() + b"\n" for step in (1, 2)]
    content = b"".join([lines[0], spoilt, *([lines[1]] if spoilt.endswith(b"\n") else [])])
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with RunLog(options_in(tmp_path), 4, is_main=True) as log:
        log.write(row(3))
    kept = [row(1), row(2), row(3)] if spoilt.endswith(b"\n") else [row(1), row(3)]
    assert rows_of(tmp_path) == kept
    assert (tmp_path / "metrics.abandoned.jsonl").read_bytes() == spoilt


def test_what_was_set_aside_before_is_kept(tmp_path):
    for step in (1, 2):
        with RunLog(options_in(tmp_path), 0, is_main=True) as log:
            log.write(row(step))
    with RunLog(options_in(tmp_path), 0, is_main=True):
        pass
    abandoned = (tmp_path / "metrics.abandoned.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in abandoned] == [row(1), row(2)]
    assert rows_of(tmp_path) == []


class FullDisk:
    """Stands for an open file: takes `room` bytes, and then raises until there is room again."""

    def __init__(self, file, room):
        self.file, self.room, self.closed = file, room, False

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        taken = min(len(data), self.room)
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= taken
        return self.file.write(data[:taken])

    def close(self):
        self.file.close()
        self.closed = True


@pytest.mark.parametrize("room", [0, 30, 500])
def test_rows_that_a_full_disk_does_not_take_are_kept(tmp_path, capsys, room):
    """They are written in order, whole, and none twice; one warning reports the full disk."""
    setup_logging(None, is_main=True)
    with RunLog(options_in(tmp_path, "--log_interval", "100"), 0, is_main=True) as log:
        log.file.file = disk = FullDisk(log.file.file, room)
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


def test_a_disk_that_stays_full_does_not_end_the_run(tmp_path, capsys):
    setup_logging(None, is_main=True)
    with RunLog(options_in(tmp_path), 0, is_main=True) as log:
        log.file.file = disk = FullDisk(log.file.file, 0)
        log.write(row(1))
    assert disk.closed and (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert "metrics.jsonl: its last 1 line(s) could not be written and are lost" in capsys.readouterr().err


def test_other_ranks_write_nothing(tmp_path, capsys):
    with RunLog(options_in(tmp_path, "--wandb", "--local_files_only"), 0, is_main=False) as log:
        log.write(row(1))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_the_first_and_every_nth_step_are_logged(tmp_path, capsys):
    setup_logging(None, is_main=True)
    with RunLog(options_in(tmp_path, "--log_interval", "3"), 0, is_main=True) as log:
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
    more = " | mfu 41.2% | mem 51.2 GB | eta 2d 03:10"
    assert format_metrics(row(3, mfu=0.4123, memory_gb=51.23), 184200) == format_metrics(row(3)) + more
    assert format_metrics(row(3, memory_gb=51.23)) == format_metrics(row(3)) + " | mem 51.2 GB"  # a GPU nobody knows


def test_what_the_gauges_show_is_in_the_rows(tmp_path):
    class Gauges:
        def read(self, tokens_per_s):
            return {"mfu": tokens_per_s / 1e6, "memory_gb": 2.5}

    with RunLog(options_in(tmp_path), 0, is_main=True, gauges=Gauges()) as log:
        log.write(given := row(1))
    assert rows_of(tmp_path) == [row(1, mfu=0.0123456, memory_gb=2.5)] and given == row(1)


def test_a_line_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch, capsys):
    """Such as one to a terminal that is gone."""
    setup_logging(None, is_main=True)
    monkeypatch.setattr(run_log, "format_metrics", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "gone")))
    with RunLog(options_in(tmp_path), 0, is_main=True) as log:
        log.write(row(1))
        log.write(row(2))
    assert rows_of(tmp_path) == [row(1), row(2)]
    assert capsys.readouterr().err.count("the log: OSError: [Errno 5] gone; it gets no more rows") == 1


# --- warnings.jsonl ------------------------------------------------------------------------------------------


def warnings_of(folder):
    return [json.loads(line) for line in (folder / "warnings.jsonl").read_text().splitlines()]


def test_warnings_are_kept(tmp_path, capsys):
    setup_logging(None, is_main=True)
    handlers = logging.getLogger("train").handlers.copy()
    before = time.time()
    with recording_warnings(rank=3) as warnings:
        warnings.write_to(tmp_path)
        logging.getLogger("train").info("all is well")
        logging.getLogger("train").warning("step %d:\nlook", 7)
        try:
            raise KeyError("gone")
        except KeyError:
            logging.getLogger("llamba").exception("it broke")
    logging.getLogger("train").warning("too late")
    first, second = warnings_of(tmp_path)
    assert first == {"time": pytest.approx(before, abs=60), "rank": 3, "text": "step 7:\nlook"}
    assert second["text"].startswith("it broke\nTraceback") and "KeyError: 'gone'" in second["text"]
    assert logging.getLogger("train").handlers == handlers
    assert "[train] all is well" in capsys.readouterr().err  # the log has them as before


def test_ranks_share_the_file(tmp_path):
    """Two processes write at the same time, and no line is torn or lost."""
    children = []
    for rank in (0, 1):
        if not (process := os.fork()):
            with recording_warnings(rank) as warnings:
                warnings.write_to(tmp_path)
                for n in range(200):
                    logging.getLogger("train").warning("%d %s", n, "x" * 500)
            os._exit(0)
        children.append(process)
    assert [os.waitpid(process, 0)[1] for process in children] == [0, 0]
    lines = warnings_of(tmp_path)
    for rank in (0, 1):
        assert [int(line["text"].split()[0]) for line in lines if line["rank"] == rank] == list(range(200))


def test_warnings_that_come_early_are_kept_until_it_is_known_where(tmp_path):
    with recording_warnings(rank=0) as warnings:
        logging.getLogger("train").warning("resuming with another --kl_weight")
        warnings.write_to(tmp_path)
        logging.getLogger("train").warning("later")
    assert [line["text"] for line in warnings_of(tmp_path)] == ["resuming with another --kl_weight", "later"]


def test_warnings_that_cannot_be_kept_end_no_run(tmp_path, capsys):
    setup_logging(None, is_main=True)
    (tmp_path / "warnings.jsonl").symlink_to("/dev/full")
    with recording_warnings(rank=0) as warnings:
        warnings.write_to(tmp_path)
        for n in range(3):
            logging.getLogger("train").warning("take care %d", n)
    shown = capsys.readouterr().err
    assert shown.count("take care") == 3 and shown.count("warnings.jsonl cannot be written (No space left") == 1


# --- status.json ---------------------------------------------------------------------------------------------


def test_the_status_of_a_run(tmp_path):
    write_status(tmp_path, "running", 0)
    assert json.loads((tmp_path / "status.json").read_text()) == {"status": "running", "exit_code": 0}
    write_status(tmp_path, "stopped", 75, micro_step=8, text="stopped by SIGTERM")
    expected = {"status": "stopped", "exit_code": 75, "micro_step": 8, "text": "stopped by SIGTERM"}
    assert json.loads((tmp_path / "status.json").read_text()) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_run_that_its_input_ends_is_not_running(tmp_path):
    with pytest.raises(ValueError), taken(options_in(tmp_path), resumed=None):
        assert read_status(tmp_path)["status"] == "running" and read_status(tmp_path)["pid"] == os.getpid()
        raise ValueError("--eval_dataset_name nope: not there")
    expected = {"status": "refused", "exit_code": 2, "text": "--eval_dataset_name nope: not there"}
    assert read_status(tmp_path) == expected


def test_a_status_that_is_damaged_says_nothing(tmp_path):
    for text in ("{", "[]", ""):
        (tmp_path / "status.json").write_text(text)
        assert read_status(tmp_path) == {}


def test_a_status_that_cannot_be_written_is_reported_and_no_more(tmp_path, capsys):
    setup_logging(None, is_main=True)
    write_status(tmp_path / "absent", "running", 0)
    assert "status.json cannot be written (No such file or directory)" in capsys.readouterr().err


def test_a_status_that_a_full_disk_does_not_take_leaves_the_one_before(tmp_path, monkeypatch, capsys):
    write_status(tmp_path, "running", 0)

    def fail(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("utils.flush_to_disk", fail)
    setup_logging(None, is_main=True)
    write_status(tmp_path, "complete", 0)
    assert "status.json cannot be written (No space left on device)" in capsys.readouterr().err
    assert read_status(tmp_path)["status"] == "running" and [path.name for path in tmp_path.iterdir()] == [
        "status.json"
    ]


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
