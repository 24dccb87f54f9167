"""The bar on a real pseudo-terminal, drawn by a process of its own and looked at as a terminal shows it; and the plain
lines elsewhere.
"""

import fcntl
import logging
import os
import pty
import struct
import sys
import termios

import pytest

from arguments import parse_train_args
from monitoring.progress_bar import Eta, format_clock
from monitoring.run_log import RunLog
from utils import setup_logging

STATIC = {"kl": 1.25, "ce": 2.375, "lr": 1e-5, "grad_norm": 0.5, "tokens": 64, "step_time_s": 0.1}


class Readings:
    """Stands for the gauges of a GPU."""

    def read(self, tokens_per_s):
        return {"mfu": tokens_per_s / 30000, "memory_gb": 51.2}


def row(step):
    return {"step": step, "micro_step": step, "loss": 2.5, "tokens_per_s": 12345.6, "teacher_wait_s": 0.02, **STATIC}


def work(folder, *more, start=0, last=6):
    """Runs some steps: logs a line before them, a warning between them, and a line after the run log is closed."""
    args = parse_train_args(["--output_dir", str(folder), "--log_interval", "100", *more])
    setup_logging(args.log_file, is_main=True)
    logger = logging.getLogger("train")
    with RunLog(args, start, is_main=True, step=start, total_steps=6, gauges=Readings()) as log:
        logger.info("it begins")
        for step in range(start + 1, last + 1):
            log.write(row(step))
            if step == 4:
                logging.getLogger("llamba").warning("take care")
    logger.info("it has ended")


def on_a_terminal(act, columns=200):
    """Returns what a process writes to its own pseudo-terminal while it runs `act`."""
    process, terminal = pty.fork()
    if not process:
        code = 1
        try:
            fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            act()
            sys.stderr.flush()
            code = 0
        finally:
            os._exit(code)
    written = b""
    try:
        while part := os.read(terminal, 65536):
            written += part
    except OSError:  # how a pseudo-terminal ends
        pass
    os.close(terminal)
    assert os.waitpid(process, 0)[1] == 0, written.decode()
    return written.decode()


def shown(written):
    """Returns the lines on the screen when all is written: a carriage return goes back, and what follows overwrites."""
    lines, column = [""], 0
    for character in written:
        if character == "\n":
            lines.append("")
        elif character == "\r":
            column = 0
        else:
            lines[-1] = lines[-1][:column].ljust(column) + character + lines[-1][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


def test_lines_stand_above_the_bar(tmp_path):
    begins, first, warning, bar, ends = shown(on_a_terminal(lambda: work(tmp_path)))
    assert (begins, warning, ends) == ("[train] it begins", "[llamba] take care", "[train] it has ended")
    assert first.startswith("[train] micro_step 1 (opt 1) | loss 2.5000 | ")
    assert bar.startswith("100%|█") and "| 6/6 [" in bar
    assert bar.endswith("eta 0:00:00], loss 2.5000 | 12,346 tok/s | mfu 41.2% | mem 51.2 GB | teacher wait 20%")


def test_the_bar_of_a_resumed_run_begins_at_its_step(tmp_path):
    written = on_a_terminal(lambda: work(tmp_path, start=3, last=5))
    assert " 50%|" in written and "| 3/6 [" in written and " 0%|" not in written
    assert "| 5/6 [" in shown(written)[-2]


def test_an_error_leaves_the_bar_and_the_log_whole(tmp_path):
    def act():
        args = parse_train_args(["--output_dir", str(tmp_path)])
        setup_logging(None, is_main=True)
        before = logging.getLogger("train").handlers.copy()
        with pytest.raises(KeyError), RunLog(args, 0, is_main=True, total_steps=6) as log:
            log.write(row(1))
            raise KeyError
        assert logging.getLogger("train").handlers == before
        print("Traceback", file=sys.stderr)

    *_, bar, traceback = shown(on_a_terminal(act))
    assert "| 1/6 [" in bar and traceback == "Traceback"


def test_a_narrow_terminal_has_each_bar_on_one_line(tmp_path):
    bars = [line for line in shown(on_a_terminal(lambda: work(tmp_path), columns=50)) if "%|" in line]
    assert len(bars) == 1 and len(bars[0]) <= 50


def test_the_log_file_has_the_lines_and_not_the_bar(tmp_path):
    on_a_terminal(lambda: work(tmp_path, "--log_file", str(tmp_path / "run.log")))
    begins, first, warning, ends = (tmp_path / "run.log").read_text().splitlines()
    assert (begins, warning, ends) == ("[train] it begins", "[llamba] take care", "[train] it has ended")
    assert first.startswith("[train] micro_step 1 ")


def test_a_dumb_terminal_has_no_bar(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    written = on_a_terminal(lambda: work(tmp_path))
    assert "it has ended" in written and "%|" not in written and "\r" not in written.replace("\r\n", "")


def test_no_color_is_asked_for_and_none_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in on_a_terminal(lambda: work(tmp_path))


def test_a_pipe_has_plain_lines(tmp_path, capfd):
    work(tmp_path, "--log_interval", "3")
    begins, first, third, warning, last, ends = capfd.readouterr().err.splitlines()
    assert first == (
        "[train] micro_step 1 (opt 1) | loss 2.5000 | kl 1.2500 | ce 2.3750 | lr 1.00e-05 | grad 0.50 | tok/s 12,346 | "
        "teacher wait 0.02s | mfu 41.2% | mem 51.2 GB"
    )
    assert third.startswith("[train] micro_step 3 ") and " | mem 51.2 GB | eta 0:00:" in third
    assert last.endswith(" | eta 0:00:00")


# --- the time that is left -----------------------------------------------------------------------------------


def test_the_time_left_is_by_the_steps_of_this_process():
    now = [1000.0]
    eta = Eta(100, clock=lambda: now[0])
    assert eta.seconds(41) is None  # however long it took: it may have compiled
    now[0] += 10
    assert eta.seconds(42) == eta.seconds(42) == 10 * 58
    now[0] += 110  # of which an evaluation took 100
    assert eta.seconds(43) == 60 * 57
    assert eta.seconds(100) == 0
    assert Eta(None).seconds(1) is None


@pytest.mark.parametrize(
    "seconds,text",
    [(None, "?"), (0.4, "0:00:00"), (3599.9, "0:59:59"), (11425, "3:10:25"), (86400, "1d 00:00"), (184200, "2d 03:10")],
)
def test_durations(seconds, text):
    assert format_clock(seconds) == text
