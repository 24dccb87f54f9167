"""What a run writes into --output_dir when the folder, or a file in it, is removed or replaced while it trains."""

import contextlib
import functools
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest

from checkpointing.run_folder import read_status, taken, write_status
from checkpointing.small_files import WRITTEN, check_places
from monitoring.run_log import RunLog
from monitoring.warnings_file import recording_warnings
from preflight.checks.basics import FAILURE, PlannedRun
from preflight.checks.storage import check_output_dir
from tests import fresh
from tests.faults.scenarios import at_micro_step, on_rank
from tests.monitoring.test_run_log import row, rows_of, warnings_of
from tests.monitoring.test_trackers import scalars
from tests.parsing import options_in
from tests.small_runs import make_models, options, read_metrics
from utils import TakenError, lock_dir, setup_logging

# --- rows ----------------------------------------------------------------------------------------------------


def remove_rows(folder):
    (folder / "metrics.jsonl").unlink()


def empty_rows(folder):
    (folder / "new").touch()
    (folder / "new").replace(folder / "metrics.jsonl")


def cut_rows_short(folder):
    content = (folder / "metrics.jsonl").read_bytes()
    (folder / "new").write_bytes(content[:-20])
    (folder / "new").replace(folder / "metrics.jsonl")


def make_folder_anew(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def test_rows_are_restored_when_they_are_flushed_too(tmp_path):
    """As before each save, and at the end of a run."""
    with RunLog(options_in(tmp_path / "out"), 0, is_main=True) as log:
        log.write(row(1))
        shutil.rmtree(tmp_path / "out")
        log.flush_to_disk()
        assert rows_of(tmp_path / "out") == [row(1)]


@pytest.mark.parametrize("trouble", [remove_rows, empty_rows, shutil.rmtree, make_folder_anew])
def test_metrics_have_every_row_in_its_place(tmp_path, trouble):
    folder = tmp_path / "out"
    folder.mkdir()
    with RunLog(options_in(folder), 0, is_main=True) as log:
        for step in (1, 2):
            log.write(row(step))
        trouble(folder)
        log.write(row(3))
        assert rows_of(folder) == [row(step) for step in (1, 2, 3)]


def test_rows_that_a_copy_has_are_not_repeated(tmp_path):
    with RunLog(options_in(tmp_path), 0, is_main=True) as log:
        for step in (1, 2, 3):
            log.write(row(step))
        cut_rows_short(tmp_path)
        log.write(row(4))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in (*lines[:2], *lines[3:])] == [1, 2, 3, 4]
    with RunLog(options_in(tmp_path), row(4)["micro_step"], is_main=True):
        assert [found["step"] for found in rows_of(tmp_path)] == [1, 2, 3, 4]  # resuming sets the spoilt line aside


# The thread of the writer ends where its folder is gone, and its exception is shown; a new one takes over.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_begins_again_with_the_whole_history(tmp_path):
    with RunLog(options_in(tmp_path, "--tensorboard"), 0, is_main=True) as log:
        for step in (1, 2):
            log.write(row(step))
        (tmp_path / "tensorboard").rename(tmp_path / "elsewhere")  # its thread may be writing there
        for step in (3, 4):
            log.write(row(step))
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1, 2, 3, 4]


def test_each_rank_restores_its_own_warnings(tmp_path):
    with recording_warnings(rank=1) as first, recording_warnings(rank=11) as second:
        for handler in (first, second):
            handler.write_to(tmp_path / "out")
        logging.getLogger("train").warning("early")
        shutil.rmtree(tmp_path / "out")
        logging.getLogger("train").warning("late")
    found = [(line["rank"], line["text"]) for line in warnings_of(tmp_path / "out") if "removed" not in line["text"]]
    assert sorted(found) == [(1, "early"), (1, "late"), (11, "early"), (11, "late")]


# --- the folder itself ---------------------------------------------------------------------------------------


@pytest.fixture
def held(tmp_path):
    """Yields (folder, log) of a run that has taken its folder."""
    args = options_in(tmp_path / "out")
    with taken(args, None):
        (tmp_path / "out" / "args.yaml").write_text("seed: 7\n")
        with RunLog(args, 0, is_main=True) as log:
            yield tmp_path / "out", log


def test_a_folder_that_was_made_anew_is_taken_again(held, capsys):
    folder, log = held
    setup_logging(None, is_main=True)
    log.write(row(1))
    make_folder_anew(folder)
    log.write(row(2))
    log.write(row(3))
    with pytest.raises(TakenError):
        lock_dir("--output_dir", folder)
    assert read_status(folder)["pid"] == os.getpid() and (folder / "args.yaml").read_text() == "seed: 7\n"
    shown = capsys.readouterr().err
    assert shown.count("its lock was removed during the run, taken again; restored status.json, args.yaml") == 1


def test_a_lock_that_was_removed_alone_is_taken_again(held, capsys):
    folder, log = held
    setup_logging(None, is_main=True)
    (folder / ".lock").unlink()
    log.write(row(1))
    with pytest.raises(TakenError):
        lock_dir("--output_dir", folder)
    assert "its lock was removed during the run, taken again\n" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_now_is_taken_later(held):
    folder, log = held
    shutil.rmtree(folder)
    folder.write_text("in its place")
    log.write(row(1))
    folder.unlink()
    log.write(row(2))
    assert rows_of(folder) == [row(1), row(2)] and (folder / ".lock").exists()


def test_a_folder_that_another_run_has_taken_meanwhile_is_left_to_it(tmp_path):
    folder = tmp_path / "out"
    args = options_in(folder)
    text = "during the run, and another run has taken it"
    with contextlib.ExitStack() as second_run:
        with pytest.raises(TakenError, match=text), taken(args, None), RunLog(args, 0, is_main=True) as log:
            log.write(row(1))
            shutil.rmtree(folder)
            second_run.enter_context(taken(args, None))
            write_status(folder, "running", 0, pid=1)
            log.write(row(2))
        assert {path.name for path in folder.iterdir()} == {".lock", "status.json"}
    assert read_status(folder)["pid"] == 1


def test_a_run_whose_folder_is_removed_completes(tmp_path):
    """On two ranks, with a save after it. Nothing is written while the folder is removed: rmtree would fail."""
    models, out = make_models(tmp_path), tmp_path / "out"
    argv = options(models, out, student_model=models / "plain", max_steps=6, no_background_save=True)
    codes, log = fresh.ranks(argv, 2, arm=functools.partial(_remove_at, 4))
    assert codes == [0, 0], log
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3, 4, 5, 6]
    assert {path.name for path in out.iterdir()} >= {".lock", "args.yaml", "status.json", "checkpoint-6", "latest"}
    assert read_status(out)["status"] == "complete"


def _remove_at(micro_step, rank):
    folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
    on_rank(0, lambda: at_micro_step(micro_step, lambda: shutil.rmtree(folder)))(rank)


# --- what is in the place of a file --------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITTEN)
def test_a_directory_in_the_place_of_a_file_is_reported_at_the_start(tmp_path, name):
    (tmp_path / name).mkdir()
    text = rf"--output_dir \S+: {name} is a directory there, expected a file; move it away"
    with pytest.raises(ValueError, match=text), taken(options_in(tmp_path), None):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_doctor_reports_it_too(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    (finding,) = check_output_dir(PlannedRun(options_in(tmp_path)))
    assert (finding.status, finding.found) == (FAILURE, "metrics.jsonl is a directory there, expected a file")
    assert finding.remedy == "move it away"


def test_a_file_without_permission_is_reported_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").touch()
    check_places(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="metrics.jsonl cannot be read and written by this user; change"):
        check_places(tmp_path)
