"""The real torchrun, restarting workers by itself and being started again after it was killed with all its workers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.compare import differences, rows
from tests.faults.launch import make_models, options

ROOT = Path(__file__).parents[1]
SHORT = dict(max_steps=9, save_interval=2)


def torchrun(output_dir, models, log, n_restarts=0, script="train_gpus.py", **changes):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [f"--max-restarts={n_restarts}", script, *options(models, output_dir, resume="auto", **SHORT, **changes)]
    with log.open("ab") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = make_models(tmp_path_factory.mktemp("restarts"))
    assert torchrun(folder / "straight", folder, folder / "straight.log").wait(200) == 0
    return folder


def test_a_rank_that_fails_is_started_again_and_the_run_goes_on_exactly(folder):
    log = folder / "restarted.log"
    output = folder / "restarted"
    run = torchrun(output, folder, log, n_restarts=2, script="tests/faults/failing_once.py")
    assert run.wait(250) == 0, log.read_text()[-4000:]
    text = log.read_text()
    assert "this run ends because rank 1 failed: RuntimeError: fails once" in text
    assert f"going on from {output}/checkpoint-" in text
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
    assert torchrun(output, folder, log).wait(200) == 0
    assert differences(folder / "straight", output, 9) == []


def test_a_run_that_was_told_to_stop_is_not_restarted(folder):
    """torchrun takes its code for a failure and starts the workers again; they end at once with the same code."""
    log, output = folder / "stopped.log", folder / "stopped"
    run = torchrun(output, folder, log, n_restarts=1, time_limit=1e-6)
    assert run.wait(200) != 0
    text = log.read_text()
    assert "not started again: stopped by --time_limit at step 1 of 9" in text
    assert len(rows(output)) == 1
