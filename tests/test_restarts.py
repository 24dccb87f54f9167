"""The real torchrun restarts workers that fail, and a run resumes after torchrun was killed with all its workers."""

import os
import signal
import subprocess
import time

import pytest

from tests import fresh
from tests.faults.compare import differences, rows
from tests.launch import start_torchrun
from tests.small_runs import make_models, options

# In the foreground: a checkpoint that is due is there before the next step, however busy the machine is.
SHORT = dict(max_steps=9, save_interval=2, resume="auto", no_background_save=True, gradient_exchange="owners")
PATIENCE_S = 500  # for a start that imports everything for each rank, on a busy machine


def finish(output_dir, models):
    """Runs or resumes on two ranks without torchrun."""
    codes, log = fresh.ranks(options(models, output_dir, **SHORT), 2)
    assert codes == [0, 0], log


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns a folder with models and an undisturbed run."""
    folder = make_models(tmp_path_factory.mktemp("restarts"))
    finish(folder / "straight", folder)
    return folder


@pytest.mark.timeout(PATIENCE_S + 100)
def test_ranks_that_fail_are_started_again_and_ranks_that_were_asked_to_stop_are_not(folder):
    """torchrun takes the exit code of a stop for a failure and starts the workers again if it may; they exit with the
    same code at once (here as forks, for each start under torchrun takes long). The run resumes exactly.
    """
    log, output = folder / "restarted.log", folder / "restarted"
    argv = options(folder, output, **SHORT)
    with log.open("wb") as file:
        run = start_torchrun("tests/faults/troubled.py", argv, "--nproc_per_node=2", "--max-restarts=1", output=file)
    assert run.wait(PATIENCE_S) != 0
    text = log.read_text()
    assert "this run ends because rank 1 failed: RuntimeError: fails once" in text
    first, restarted = text.split(f"resuming from {output}/checkpoint-4")
    assert "fails once" in first and "stopped by SIGTERM at step 6 of 9" in restarted
    codes, again = fresh.ranks(argv, 2, TORCHELASTIC_RESTART_COUNT="2")
    assert codes == [75, 75] and "not started again: stopped by SIGTERM at step 6 of 9" in again
    assert len(rows(output)) == 6
    finish(output, folder)
    assert differences(folder / "straight", output, 9) == []


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE_S + 100)
def test_a_run_resumes_after_torchrun_was_killed_with_its_workers(folder):
    """The kills of test_faults.py without torchrun are the same for the ranks; hence not in `make test`."""
    log, output = folder / "killed.log", folder / "killed"
    with log.open("wb") as file:
        run = start_torchrun("train_gpus.py", options(folder, output, **SHORT), "--nproc_per_node=2", output=file)
    deadline = time.monotonic() + PATIENCE_S
    while not (output / "checkpoint-4").exists():
        assert time.monotonic() < deadline and run.poll() is None, log.read_text()[-4000:]
        time.sleep(0.01)
    for line in subprocess.run(["ps", "-o", "pid=,args=", "-A"], capture_output=True, text=True).stdout.splitlines():
        pid, command = line.split(maxsplit=1)
        if str(output) in command:
            os.kill(int(pid), signal.SIGKILL)
    run.wait(30)
    finish(output, folder)
    assert differences(folder / "straight", output, 9) == []
