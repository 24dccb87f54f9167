"""All entries answer --help, and options that cannot be used, before they import torch, which takes seconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ["torch", "transformers", "datasets", "matplotlib"]
RUN = f"""
import json, runpy, sys
entry, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, {str(ROOT)!r})
try:
    runpy.run_path(entry, run_name="__main__")
finally:
    print(json.dumps([name for name in {HEAVY} if name in sys.modules]), file=sys.stderr)
"""


def answer(entry, *options):
    """Returns the exit code of an entry, all that it printed, and which of the heavy packages it has imported."""
    command = [sys.executable, "-c", RUN, str(ROOT / entry), *options]
    process = subprocess.run(command, capture_output=True, text=True, timeout=200)
    *lines, loaded = process.stderr.splitlines()
    return process.returncode, "\n".join([process.stdout, *lines]), json.loads(loaded)


@pytest.mark.parametrize(
    "entry", ["train_gpus.py", "eval_mmlu_hybrid.py", "make_student.py", "choose_layers.py", "doctor.py", "report.py"]
)
def test_help_is_shown_before_torch_is_imported(entry):
    code, printed, loaded = answer(entry, "--help")
    assert (code, loaded) == (0, []) and "--help" in printed


@pytest.mark.parametrize(
    "entry", ["train_gpus.py", "eval_mmlu_hybrid.py", "make_student.py", "choose_layers.py", "report.py"]
)
def test_an_unknown_option_is_reported_before_torch_is_imported(entry):
    """The doctor looks for packages first, whatever its options are."""
    code, printed, loaded = answer(entry, "--no_such_option", "value")
    assert (code, loaded) == (2, []) and "--no_such_option" in printed


def test_options_are_read_once():
    """A file that can be read only once, such as a pipe, would be empty the second time, and its options be lost."""
    command = [sys.executable, str(ROOT / "train_gpus.py"), "--config", "/dev/stdin"]
    options = "preset: tiny\nlayers: [9]\noutput_dir: not-written\n"
    process = subprocess.run(command, input=options, capture_output=True, text=True, timeout=200)
    assert process.returncode == 2 and "--layers 9: [9] out of range" in process.stderr
