"""What a run does in trouble, on real processes: tests/faults/scenarios.py plays, these tests check what is left. The
campaign of `kill -9` in tests/faults/kills.py has its full length in `make faults`.
"""

import errno
import json
import random
import re

import numpy as np
import pytest

from tests import fresh
from tests.faults import scenarios
from tests.faults.compare import differences, rows, tensors
from tests.faults.damage import damage_checkpoints, damage_texts
from tests.faults.failing_saves import Fault, try_faults
from tests.faults.kills import run_campaign
from tests.small_runs import make_models, read_metrics

RESULT_OF_SIGNAL = 75


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Returns the folder of all scenarios."""
    return make_models(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def played(stage):
    """Returns a function that plays a scenario, if no test has done so yet, and returns its output directory."""

    def play(name):
        if not (stage / f"{name}.json").exists():
            fresh.call(scenarios.play, stage, name)
        return stage / name

    return play


@pytest.fixture
def facts(played):
    """Returns a function that returns the exit codes and the log of a scenario's only launch, or a list of both."""

    def of(name):
        found = json.loads(played(name).with_suffix(".json").read_text())
        return found if len(found) > 1 else found[0]

    return of


# --- kill -9 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane,kills", [("cached", 2), ("stream", 1), ("owners", 1)])
def test_a_run_killed_again_and_again_equals_one_that_was_left_alone(tmp_path, lane, kills):
    result = fresh.call(run_campaign, tmp_path, lane, 2, kills, 0, 8)
    assert result["kills"] == kills
    assert result["runs"] >= 1
    assert result["differences"] == []


# --- asked to stop -------------------------------------------------------------------------------------------


def test_signals_and_the_time_limit_stop_all_ranks_with_a_saved_state(facts):
    *stopped, last, complete = facts("signals")
    for fact, reason in zip(stopped, ["SIGTERM", "SIGINT", "SIGUSR1", "--time_limit"], strict=True):
        assert fact["codes"] == [RESULT_OF_SIGNAL] * 2
        assert f"stopped by {reason} at step" in fact["log"]
    assert last["codes"] == complete["codes"] == [0, 0]
    assert "complete: 9 of 9" in complete["log"] and "micro_step 1 " not in complete["log"]


def test_a_run_stopped_within_an_accumulation_resumes_exactly(played):
    assert differences(played("straight_accumulated"), played("signals"), 18) == []


def test_status_says_how_a_run_ended(played):
    def status(name):
        return json.loads((played(name) / "status.json").read_text())

    assert (status("signals")["status"], status("signals")["exit_code"]) == ("complete", 0)
    assert (status("stream_of_other_world_size")["status"]) == "complete"


def test_a_signal_before_training_ends_the_run_at_once(facts):
    fact = facts("signal_before_training")
    assert fact["codes"] == [RESULT_OF_SIGNAL] * 2
    assert "stopped by SIGTERM" in fact["log"]


def test_a_signal_stops_the_tokenising_and_leaves_nothing_half_made(stage, facts):
    stopped, later = facts("signal_while_tokenising")
    assert stopped["codes"] == [75, 75]
    assert "stopped by SIGTERM" in stopped["log"] and "packed " not in stopped["log"]
    assert later["codes"] == [0, 0] and "packed " in later["log"]
    assert len(list((stage / "stopped-cache" / "packed").iterdir())) == 1


# --- another number of ranks ---------------------------------------------------------------------------------


def logged_windows(stage, run, n_ranks):
    """Returns the windows of each micro step, those of all ranks in order."""
    by_rank = [(stage / f"windows-{run}-{r}.jsonl").read_text().splitlines() for r in range(n_ranks)]
    return [[i for line in lines for i in json.loads(line)] for lines in zip(*by_rank, strict=True)]


def test_two_then_three_then_one_rank_take_every_window_once(stage, facts):
    alone, *stages = facts("other_world_sizes")
    assert [fact["codes"] for fact in stages] == [[75, 75], [75, 75, 75], [0]]
    steps = [logged_windows(stage, run, n_ranks) for run, n_ranks in enumerate((2, 3, 1))]
    assert [len(run) for run in steps[:2]] == [5, 7] and len(steps[2]) > 10
    taken = [i for run in steps for step in run for i in step]
    n_windows = int(re.search(r"(\d+) windows in 1 epoch", alone["log"])[1])
    order = np.random.default_rng([0, 0]).permutation(n_windows)
    assert taken == order[: n_windows // 6 * 6].tolist()  # the last ones fill no step


def test_optimizer_shards_find_their_new_ranks(stage, played):
    """With the same windows in each step, the number of ranks changes no more than rounding."""
    folder = played("other_world_sizes")
    alone, together = rows(stage / "one_world"), rows(folder)
    assert len(alone) == len(together) > 20
    for a, b in zip(alone, together, strict=True):
        assert (a["step"], a["tokens"], a["lr"]) == (b["step"], b["tokens"], b["lr"])
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-2)
    assert len(list((folder / "checkpoint-5").glob("optimizer-*"))) == 2
    assert len(list((folder / "checkpoint-12").glob("optimizer-*"))) == 3


def test_a_stream_is_not_shared_out_anew(facts):
    ran, refused = facts("stream_of_other_world_size")
    assert ran["codes"] == [0, 0] and refused["codes"][0] == 2
    assert "--nproc_per_node: 3 rank(s)" in refused["log"] and "--no_dataset_streaming" in refused["log"]


# --- what is not finite --------------------------------------------------------------------------------------


def test_bad_steps_are_skipped_by_all_ranks_and_counted(played, facts):
    fact = facts("two_bad_steps")
    assert fact["codes"] == [0, 0]
    assert "step 4 skipped: loss nan" in fact["log"] and "rank 1 had windows [36, 446]" in fact["log"]
    assert "rank 0 had windows" not in fact["log"]  # its losses were finite
    lines = read_metrics(played("two_bad_steps"))
    assert [row["skipped_updates"] for row in lines[:6]] == [0, 0, 0, 1, 2, 2]
    assert lines[3]["loss"] is None and lines[5]["loss"] > 0


def test_a_run_that_diverges_stops_with_its_last_good_weights(played, facts):
    stopped, resumed = facts("diverged")
    assert stopped["codes"] == [76, 76] and "3 updates in a row were skipped" in stopped["log"]
    last_good, saved = tensors(played("straight") / "checkpoint-6"), tensors(played("diverged") / "checkpoint-9")
    assert len(saved) == len(last_good)
    assert {name for name in saved if saved[name] != last_good[name]} == {"rng/0/cpu", "rng/1/cpu"}
    assert resumed["codes"] == [0, 0] and "complete: 12 of 12" in resumed["log"]


def test_a_loss_that_stands_out_is_reported(facts):
    log = facts("loss_spike")["log"]
    assert log.count("stands out") == 2  # each rank with its windows
    assert "step 10: loss" in log


# --- ranks that fail or die ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scenario,codes,cause",
    [
        ("a_rank_raises", [1, 1, 1], "rank 2 failed: RuntimeError: a fault of this test"),
        ("a_rank_is_killed", [1, -9, 1], "rank 1 ended without a message"),
        ("rank_0_is_killed", [-9, 1, 1], "rank 0 ended without a message"),
        ("a_rank_dies_while_others_wait_in_native_code", [1, -9], "rank 1 ended without a message"),
        ("the_teacher_runs_out_of_memory", [1, 1], "rank 0 failed: OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_one_ranks_end_is_everybodys_with_the_first_cause_in_the_log(facts, scenario, codes, cause):
    fact = facts(scenario)
    assert fact["codes"] == codes
    assert f"this run ends because {cause}" in fact["log"]


def test_a_rank_that_is_halted_for_a_while_changes_nothing(played, facts):
    assert facts("a_rank_is_halted_for_a_while")["codes"] == [0, 0]
    assert differences(played("straight"), played("a_rank_is_halted_for_a_while"), 12) == []


def test_of_an_error_the_failing_rank_logs_the_traceback_and_the_others_the_cause(facts, played):
    log = facts("a_rank_raises")["log"]
    assert log.count("this run ends because rank 2 failed: RuntimeError: a fault of this test") == 2
    assert log.count("RuntimeError: a fault of this test") == 3
    assert "Traceback" in log and "in raise_error" in log
    folder = played("a_rank_raises")
    assert (folder / "checkpoint-0").is_dir() and not (folder / "checkpoint-6").exists()
    assert json.loads((folder / "status.json").read_text())["status"] == "running"  # no rank could change it


# --- disks ---------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_no_step(played, facts):
    fact = facts("full_disk")
    assert fact["codes"] == [0, 0]
    assert "checkpoint of micro step 6 could not be written by rank 1 (" in fact["log"]
    assert "its newest checkpoint is that of micro step 3" in fact["log"]
    assert differences(played("straight"), played("full_disk"), 12) == []
    kept = {path.name for path in played("full_disk").iterdir() if "checkpoint" in path.name}
    assert {"checkpoint-0", "checkpoint-3", "checkpoint-12"} <= kept
    assert not kept & {"checkpoint-6", "checkpoint-9", ".partial-checkpoint-6-0"}


SAVES_THAT_FAIL = {
    Fault("writing tensors", rank=0, first=1, times=1, code=errno.EROFS): "refused before training",
    Fault("flushing a file", rank=1, first=9, times=2, code=errno.ENOSPC): "saved later",
    Fault("after the rename", rank=0, first=3, times=1, code=errno.EIO): "logged",
}


def test_saves_that_fail_anywhere_lose_nothing(stage, played, tmp_path):
    tried = fresh.call(try_faults, stage, played("straight"), tmp_path, list(SAVES_THAT_FAIL))
    assert tried == [(str(fault), outcome, []) for fault, outcome in SAVES_THAT_FAIL.items()]


def test_a_folder_copied_by_what_follows_links_is_resumed_like_the_first(stage, played):
    """The link has become a folder: the new one is right, and old checkpoints are deleted as ever."""
    straight = played("straight")
    played("a_copied_folder")
    for how in ("auto", "latest"):
        folder = stage / f"copied-{how}"
        assert differences(straight, folder, 12) == []
        assert sorted(path.name for path in folder.glob("*checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]
        assert (folder / "latest").is_symlink() and (folder / "latest").resolve().name == "checkpoint-12"
        assert {file.name for file in (folder / "latest-copy").iterdir()} >= {"training_state.json", "SHA256SUMS"}


def test_a_run_whose_first_checkpoint_cannot_be_written_ends_before_it_has_anything_to_lose(played, facts):
    fact = facts("no_checkpoint_can_be_written")
    assert fact["codes"][0] == 2
    message = "checkpoint of micro step 0 could not be written by rank 1 (OSError: [Errno 27] File too large)"
    assert fact["log"].count(message) == 1 and "micro_step 12 " not in fact["log"]
    status = json.loads((played("no_checkpoint_can_be_written") / "status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("refused", 2) and message in status["text"]


def test_a_copy_that_does_not_fit_costs_no_step(played, facts):
    fact = facts("no_memory_for_the_copy")
    assert fact["codes"] == [0, 0]
    assert "checkpoint of micro step 3 could not be written by rank 1 (MemoryError" in fact["log"]
    saved = {path.name for path in played("no_memory_for_the_copy").glob("checkpoint-*")}
    assert "checkpoint-3" not in saved and {"checkpoint-0", "checkpoint-8"} < saved  # and that of another try


def test_nobody_waits_for_a_slow_disk(facts):
    fact = facts("slow_disk")
    assert fact["codes"] == [0, 0]
    began, saved = fact["log"].index("saving micro step 4;"), fact["log"].index("/checkpoint-4, ")
    assert began < fact["log"].index("micro_step 5 ") < fact["log"].index("micro_step 7 ") < saved


def test_a_bad_row_is_named_or_left_out_in_both_lanes(facts):
    cached, cached_skipping, stream, stream_skipping = facts("a_bad_row")
    for fact in (cached, stream):
        assert fact["codes"] == [2] and "bad.jsonl" in fact["log"] and "line 3" in fact["log"]
        assert "--skip_bad_rows" in fact["log"]
    for fact in (cached_skipping, stream_skipping):
        assert fact["codes"] == [0] and "skipped 1 of" in fact["log"]


def test_a_mistake_that_one_rank_finds_is_reported_by_rank_0(facts):
    fact = facts("a_mistake_that_one_rank_finds")
    assert fact["codes"][0] == 2
    assert fact["log"].count("error: --flag 7: a mistake of this test") == 1 and "(on rank 1)" in fact["log"]


def test_the_last_state_waits_for_room(facts):
    fact = facts("full_disk_at_the_end")
    assert fact["codes"] == [0, 0] and "waits up to 6 h" in fact["log"] and "checkpoint-2," in fact["log"]


def test_auto_resumes_from_the_newest_good_checkpoint_and_never_silently_at_0(played, facts):
    _, resumed, refused = facts("bad_checkpoints")
    folder = played("bad_checkpoints")
    assert resumed["codes"] == [0, 0] and f"resuming from {folder}/checkpoint-6" in resumed["log"]
    assert "bad-checkpoint-12" in resumed["log"] and "model-00002-of-00002.safetensors" in resumed["log"]
    assert (folder / "bad-checkpoint-12").is_dir() and (folder / "bad-checkpoint-9").is_dir()
    assert rows(folder) == rows(played("straight"))
    assert refused["codes"][0] == 2 and "no good checkpoint" in refused["log"]


def test_no_damage_to_a_checkpoint_goes_unnoticed(played, tmp_path):
    result = damage_checkpoints(played("straight") / "checkpoint-3", tmp_path, 60, random.Random(0))
    assert result["missed"] == [] and sum(result["caught"].values()) == 60


def test_damaged_texts_are_read_or_refused_by_name(tmp_path):
    result = damage_texts(tmp_path, 12, random.Random(0))
    assert result["unforeseen"] == []
    assert {"refused, with the file's name", "read without the bad rows"} <= result["outcomes"].keys()


def test_another_run_is_not_resumed(facts):
    _, other, foreign = facts("another_run")
    assert other["codes"][0] == foreign["codes"][0] == 2
    for flag in ("--seed 1", "--layers 1 2:", "--dtype bfloat16"):
        assert flag in other["log"]
    assert "has no training_state.json" in foreign["log"] and "--student_model" in foreign["log"]


def test_a_directory_belongs_to_one_run_at_a_time(stage, facts):
    assert facts("two_at_once")["codes"] == [0]
    assert "another run is writing there" in (stage / "second.log").read_text()


def test_all_nodes_have_to_see_the_same_folder(facts):
    fact = facts("nodes_without_a_shared_folder")
    assert 2 in fact["codes"] and "not the same folder on all nodes" in fact["log"]


def test_old_checkpoints_are_deleted_if_asked(played):
    folder = played("few_are_kept")
    assert sorted(path.name for path in folder.glob("*checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]
    assert (folder / "latest").resolve().name == "checkpoint-12"


def test_saving_in_the_foreground_saves_the_same(played):
    background, foreground = played("straight"), played("in_the_foreground")
    assert differences(background, foreground, 12) == []
    for step in (0, 9):
        assert tensors(background / f"checkpoint-{step}") == tensors(foreground / f"checkpoint-{step}")


# --- weights that do not move --------------------------------------------------------------------------------


def test_lost_updates_are_reported(stage, facts):
    without, with_masters = facts("health")
    assert "are lost; train with --master_weights" in without["log"] and "% of the mixers" in without["log"]
    assert "are lost" not in with_masters["log"]

    def shares(folder):
        return [row["update_health"] for row in read_metrics(stage / folder) if "update_health" in row]

    assert len(shares("health")) == 2
    assert shares("health-masters")[1]["mixers"] > 3 * shares("health")[1]["mixers"]
