"""How a run says that it ended: complete, stopped or diverged, in the log, in status.json and by its exit code."""

import functools
import json
from types import SimpleNamespace

import pytest

from checkpointing import run_folder
from checkpointing.state import RunState
from processes import exits
from processes.exits import REASONS, StopRequest
from tests import fresh
from tests.faults.scenarios import spoil_loss
from tests.parsing import options_in
from tests.small_runs import make_models, options
from train_gpus import how_it_ended

SIGTERM = REASONS.index("SIGTERM")


@pytest.mark.parametrize(
    "step,skipped,in_a_row,stopped_by,status,code",
    [
        (12, 0, 0, 0, "complete", 0),
        (12, 11, 0, 0, "complete", 0),  # the last update was applied
        (9, 2, 0, 0, "complete", 0),  # a stream that ended early
        (12, 1, 1, 0, "complete", 0),  # with a warning
        (12, 5, 5, 0, "diverged", 76),
        (12, 12, 12, 0, "diverged", 76),
        (12, 12, 0, 0, "diverged", 76),  # float16 that overflowed in each step
        (9, 2, 2, 0, "complete", 0),
        (7, 5, 5, 0, "diverged", 76),  # --max_bad_steps
        (7, 5, 5, SIGTERM, "diverged", 76),
        (7, 4, 4, SIGTERM, "stopped", 75),  # the next update may be applied
        (12, 0, 0, SIGTERM, "complete", 0),
        (12, 2, 2, SIGTERM, "complete", 0),
        (0, 0, 0, SIGTERM, "stopped", 75),
    ],
)
def test_a_run_is_complete_if_an_update_was_applied(tmp_path, step, skipped, in_a_row, stopped_by, status, code):
    args = options_in(tmp_path, "--max_bad_steps", "5")
    state = RunState(micro_step=step, step=step, skipped_updates=skipped, bad_in_a_row=in_a_row)
    ending = how_it_ended(args, state, 12, stopped_by)
    assert (ending.status, ending.code) == (status, code), ending.text


def test_an_alignment_says_what_comes_after_it(tmp_path):
    state = RunState(micro_step=12, step=12)
    models = ("--preset", "llama-1b", "--teacher_model", "mine", "--layers", "0", "5")
    models_of_run = f"--preset llama-1b --teacher_model mine --student_model {tmp_path}/latest --layers 0 5"
    for stage, found in (("align", f"distil the student with {models_of_run}"), ("distil", "")):
        ending = how_it_ended(options_in(tmp_path, "--stage", stage, *models), state, 12, 0)
        assert ending.text.startswith("complete: 12 of 12 optimizer steps") and ending.text.endswith(found or "steps")


def test_a_run_that_has_applied_no_update_is_not_complete(tmp_path):
    """Not even when it is started again; with more steps it resumes."""
    models = make_models(tmp_path)

    def run(arm=None, **changes):
        argv = options(models, tmp_path / "out", student_model=models / "plain", resume="auto", **changes)
        codes, log = fresh.ranks(argv, 1, arm=arm)
        return codes, log, json.loads((tmp_path / "out" / "status.json").read_text())

    for _ in range(2):
        codes, log, status = run(functools.partial(_spoil, 0), max_steps=3, max_bad_steps=9)
        assert codes == [76] and status["status"] == "diverged" and status["exit_code"] == 76
        assert "all 3 update(s) were skipped, their loss or gradient was not finite: the run diverged" in log
    codes, log, status = run(max_steps=5, max_bad_steps=9)
    assert codes == [0] and status["status"] == "complete" and "complete: 5 of 5 optimizer steps" in log


def _spoil(first, rank):
    spoil_loss(first, 10**9, float("nan"))


# --- the time limit ------------------------------------------------------------------------------------------


@pytest.fixture
def clocks(monkeypatch):
    """Returns clocks that stand still until a test sets them: `wall` since 1970, `boot` since the machine started."""
    clocks = SimpleNamespace(wall=1e9, boot=1e4)
    played = SimpleNamespace(time=lambda: clocks.wall, monotonic=lambda: clocks.boot)
    monkeypatch.setattr(run_folder, "time", played)
    monkeypatch.setattr(exits, "time", played)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    return clocks


@pytest.mark.parametrize("jump", [0, 86400 * 30, -86400 * 30])
def test_the_time_limit_counts_from_the_launch_whatever_the_wall_clock_does(tmp_path, clocks, monkeypatch, jump):
    assert run_folder.begin_status(tmp_path) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    clocks.wall += jump + 600
    clocks.boot += 600
    stop = StopRequest(time_limit=15)
    stop.count_from(run_folder.begin_status(tmp_path))
    assert run_folder.read_status(tmp_path)["launched"] == 1e9
    clocks.wall -= 2 * jump
    assert stop.code == 0
    clocks.boot += 299
    assert stop.code == 0
    clocks.boot += 2
    assert REASONS[stop.code] == "--time_limit"


@pytest.mark.parametrize("passed,counted", [(600, 600), (-86400, 0)])
def test_on_another_machine_the_wall_clock_has_to_do(tmp_path, clocks, monkeypatch, passed, counted):
    run_folder.begin_status(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(run_folder, "boot_id", lambda: "another")
    clocks.wall += passed
    clocks.boot = 5.0
    assert run_folder.begin_status(tmp_path) == counted


def test_a_run_that_is_started_again_by_hand_has_all_its_time(tmp_path, clocks):
    run_folder.begin_status(tmp_path)
    clocks.wall += 600
    clocks.boot += 600
    assert run_folder.begin_status(tmp_path) == 0
