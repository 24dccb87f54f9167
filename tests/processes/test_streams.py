"""Standard streams that are closed, or whose reader or disk is gone: real processes, which import nothing heavy."""

import json
import os
import subprocess
import sys

import pytest

from tests.launch import ROOT

PRINT = "import sys; from processes.exits import run_entry; sys.exit(run_entry(lambda: print('x' * {length})))"
HELP = (
    "from arguments import parse_train_args; from processes.exits import answer_early; answer_early(parse_train_args)"
)
LIST_FILES = """
import json, os, sys
from processes.exits import run_entry
def main():
    with open(sys.argv[1], "w") as file:
        json.dump([os.readlink(f"/proc/self/fd/{n}") for n in range(3)] + [file.fileno() > 2], file)
sys.exit(run_entry(main))
"""


def run(code, *argv, unbuffered="", **streams):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    return subprocess.run([sys.executable, "-c", code, *argv], env=environment, timeout=100, **streams)


@pytest.fixture
def no_reader():
    """Returns the end to write to of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("length,unbuffered", [(1, ""), (10**6, ""), (1, "1")])
def test_a_reader_that_has_enough_causes_no_traceback(no_reader, length, unbuffered):
    ended = run(PRINT.format(length=length), unbuffered=unbuffered, stdout=no_reader, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (1, b"")


def test_nor_does_one_of_the_help(no_reader):
    ended = run(HELP, "--help", stdout=no_reader, stderr=subprocess.PIPE)
    assert ended.stderr == b""


def test_without_a_reader_an_entry_that_prints_nothing_ends_as_ever(no_reader):
    assert run(PRINT.replace("print('x' * {length})", "76"), stdout=no_reader).returncode == 76


def test_without_a_reader_any_other_error_has_its_traceback(no_reader):
    """Although what was printed before it cannot be written either."""
    fails = "(print('x'), open('/proc/nowhere'))"
    ended = run(PRINT.replace("print('x' * {length})", fails), stdout=no_reader, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1 and "No such file or directory: '/proc/nowhere'" in ended.stderr


def test_a_full_disk_behind_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        ended = run(PRINT.format(length=1), stdout=full, stderr=subprocess.PIPE, text=True)
    text = "error: standard output cannot be written (No space left on device)\n"
    assert (ended.returncode, ended.stderr) == (1, text)


def test_another_error_keeps_its_traceback():
    code = "import sys; from processes.exits import run_entry; run_entry(lambda: open('/nowhere/file'))"
    ended = run(code, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1 and "Traceback" in ended.stderr and "/nowhere/file" in ended.stderr


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path):
    def close_all():
        for descriptor in range(3):
            os.close(descriptor)

    assert run(LIST_FILES, str(tmp_path / "files"), preexec_fn=close_all).returncode == 0
    assert json.loads((tmp_path / "files").read_text()) == [os.devnull] * 3 + [True]
