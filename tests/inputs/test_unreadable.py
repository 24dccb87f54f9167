"""Folders that this user may not enter: one line for each option that names a path below one. Permissions do not stop
every user, so the system's refusal is played.
"""

import errno
import io
import os
import shutil
from pathlib import Path

import pytest

from evaluation.checks import _check_output
from evaluation.mmlu_files import load_mmlu
from evaluation.sources import find_checkpoint
from inputs.model_files import dead_links, folder_of
from model_utils import locate_model
from monitoring.trackers import check_trackers
from paths import readable
from preflight.checks import storage
from preflight.plan_report import print_plan
from preflight.time_report import measured_speed
from tests.launch import ROOT
from tests.parsing import eval_options, options_in, train_options
from tests.preflight.cases import found, the_bad_one
from tests.text.documents import options
from text.cache import folder_for_tables
from text.opening import local_path, open_source
from text.sources import TextSource

REASON = "cannot be read (Permission denied); let this user read it and the folders above it, or name another"


@pytest.fixture
def closed(tmp_path, monkeypatch):
    """Returns a folder of which nothing inside can be looked at."""
    folder, stat = tmp_path / "closed", os.stat
    folder.mkdir()

    def refuse_inside(path, *args, **kwargs):
        if isinstance(path, str | os.PathLike) and str(path).startswith(f"{folder}/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", refuse_inside)
    return folder


CALLS = {
    "--teacher_model {}": lambda path: locate_model("--teacher_model", str(path), True),
    "--dataset_name '{}'": lambda path: open_source(TextSource.for_training(options(path))),
    "--dataset_name '{}' ": lambda path: local_path(TextSource.for_training(options(path))),
    "--held_out '{}'": lambda path: open_source(TextSource.for_eval_script(eval_options(f"--held_out {path}"))),
    "--mmlu_dir {}": lambda path: load_mmlu(str(path)),
    "--ckpt {}": lambda path: find_checkpoint(eval_options(f"--which hybrid_ft --ckpt {path}"), None),
}


@pytest.mark.parametrize("begin", CALLS)
@pytest.mark.parametrize("below", ["", "below", "below/it"])
def test_an_input_that_cannot_be_looked_at(closed, begin, below):
    path = closed / below
    with pytest.raises(ValueError) as error:
        CALLS[begin](path)
    assert str(error.value) == f"{begin.strip().format(path)}: {REASON}"


def test_outputs_that_cannot_be_looked_at(closed):
    for more in ("", "--resume", "--overwrite"):
        with pytest.raises(ValueError, match=f"--output {closed}/a.json: cannot be written .Permission denied.; give"):
            _check_output(eval_options(f"--output {closed}/a.json {more}"))
    with pytest.raises(ValueError, match=f"--tensorboard: {closed}/run/tensorboard: cannot be read .*--output_dir"):
        check_trackers(options_in(closed / "run", "--tensorboard"))
    with pytest.raises(ValueError, match=f"--plan_json {closed}/below/plan.json: cannot be read .Permission denied"):
        print_plan(train_options(f"--preset tiny --dry_run --plan_json {closed}/below/plan.json"))
    assert measured_speed(options_in(closed / "run")) is None


def test_a_cache_that_cannot_be_looked_at(closed):
    source = TextSource.for_training(options("someone/something", dataset_cache_dir=str(closed / "cache")))
    with pytest.raises(ValueError, match=f"--dataset_cache_dir {closed}/cache.*: cannot be written .Permission denied"):
        folder_for_tables(source)


def test_the_doctor_reports_a_folder_that_cannot_be_looked_at(closed, monkeypatch):
    seen = []
    monkeypatch.setattr(storage, "folder_problem", lambda folder: seen.append(folder) or f"{folder} cannot be written")
    for check, option in ((storage.check_log_file, "--log_file"), (storage.check_output_dir, "--output_dir")):
        bad = the_bad_one(found(check, option, closed / "below" / "it"))
        assert bad.found == f"{closed} cannot be written"
    assert seen == [closed, closed]


def test_a_name_that_cannot_be_looked_at_is_no_folder(closed):
    assert folder_of(f"{closed}/teacher") is None


def test_folders_that_cannot_be_listed(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    for begin in ("--dataset_name '{}'", "--mmlu_dir {}"):
        with pytest.raises(ValueError) as error:
            CALLS[begin](tmp_path)
        assert str(error.value) == f"{begin.format(tmp_path)}: {REASON}"
    assert dead_links(tmp_path) == ""  # a remark beside another error


def test_weights_that_cannot_be_read_are_not_said_to_be_missing(tmp_path, monkeypatch):
    teacher = shutil.copytree(ROOT / "presets" / "tiny" / "teacher", tmp_path / "teacher")
    weights, opened = teacher / "model.safetensors", io.open

    def refuse(file, *args, **kwargs):
        if Path(str(file)) == weights:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
        return opened(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", refuse)
    with pytest.raises(ValueError) as error:
        locate_model("--teacher_model", str(teacher), True)
    assert str(error.value).startswith(f"--teacher_model {teacher}: cannot be read (Permission denied: {weights}); let")


def test_what_is_not_there_is_left_to_the_block(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("nothing", "file", "file/below", "loop"):
        with readable("--flag x", tmp_path / name):
            pass
    too_long = readable("--flag x", "a/" * 3000)
    with pytest.raises(ValueError, match="^--flag x: cannot be read .File name too long.; let"), too_long:
        pass
