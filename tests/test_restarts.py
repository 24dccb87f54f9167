"""The real torchrun, restarting workers by itself and being started again after it was killed with all its workers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import fresh
from tests.faults.compare import differences, rows
from tests.faults.launch import make_models, options

ROOT = Path(__file__).parents[1]
SHORT = dict(max_steps=9, save_interval=2)


def torchrun(output_dir, models, log, n_restarts=0, script="train_gpus.py"):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [f"--max-restarts={n_restarts}", script, *options(models, output_dir, resume="auto", **SHORT)]
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)


def go_on(output_dir, models):
    """In two ranks without torchrun."""
    codes, log = fresh.ranks(options(models, output_dir, resume="auto", **SHORT), 2)
    assert codes == [0, 0], log


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_models(tmp_path_factory.mktemp("restarts"))
    go_on(folder / "straight", folder)
    return folder


def test_ranks_that_fail_are_started_again_and_ranks_that_were_told_to_stop_are_not(folder):
    """torchrun takes the code of a stop for a failure and starts the workers again; they end at once with the same
    code. What is left goes on exactly.
    """
    log, output = folder / "restarted.log", folder / "restarted"
    run = torchrun(output, folder, log, n_restarts=2, script="tests/faults/troubled.py")
    assert run.wait(250) != 0
    text = log.read_text()
    assert "this run ends because rank 1 failed: RuntimeError: fails once" in text
    first, restarted = text.split(f"resuming from {output}/checkpoint-")
    assert "fails once" in first and "stopped by SIGTERM at step 6 of 9" in restarted
    assert "not started again: stopped by SIGTERM at step 6 of 9" in restarted
    assert len(rows(output)) == 6
    go_on(output, folder)
    assert differences(folder / "straight", output, 9) == []


def test_torchrun_killed_with_its_workers_is_started_again(folder):
    log, output = folder / "killed.log", folder / "killed"
    run = torchrun(output, folder, log)
    deadline = time.monotonic() + 200
    while not (output / "checkpoint-4").exists():
        assert time.monotonic() < deadline and run.poll() is None, log.read_text()[-4000:]
        time.sleep(0.01)
    for line in subprocess.run(["ps", "-o", "pid=,args=", "-A"], capture_output=True, text=True).stdout.splitlines():
        pid, command = line.split(maxsplit=1)
        if str(output) in command:
            os.kill(int(pid), signal.SIGKILL)
    run.wait(30)
    go_on(output, folder)
    assert differences(folder / "straight", output, 9) == []
