"""What `--resume` names, and what is said where that is no checkpoint: links, copies of them, empty folders, others."""

import os
import shutil
from types import SimpleNamespace

import pytest

from checkpointing.candidates import followed
from checkpointing.resume import Resume
from tests.parsing import options_in
from tests.preflight.cases import checkpoint_of


@pytest.fixture
def run(tmp_path):
    """Returns the folder of a run with checkpoints 2 and 6, and with the link."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (2, 6):
        checkpoint_of(folder, step, "--output_dir", folder)
    (folder / "latest").symlink_to("checkpoint-6")
    return folder


@pytest.fixture
def copied(run):
    """Returns a copy of the run's folder in which links were followed."""
    return shutil.copytree(run, run.with_name("copied"))


def resumed(folder, resume):
    return Resume(options_in(folder, "--preset", "tiny", "--resume", str(resume)), 1)


def refusal(folder, resume):
    with pytest.raises(ValueError) as error:
        resumed(folder, resume)
    assert str(error.value).startswith(f"--resume {resume}: ")
    return str(error.value)


def test_latest_is_followed_as_a_link_and_as_a_folder(run, copied):
    for folder in (run, copied):
        found = resumed(folder, folder / "latest")
        assert (found.checkpoint, found.resumed) == (folder / "checkpoint-6", 6)
    assert (copied / "latest").is_dir() and not (copied / "latest").is_symlink()


def test_a_resumed_run_makes_the_link_at_its_start(copied):
    alone = SimpleNamespace(rank=0, world_size=1, is_main=True, maximum=lambda *own: list(own))
    resumed(copied, copied / "latest").choose(alone)
    assert os.readlink(copied / "latest") == "checkpoint-6" and (copied / "latest-copy" / "config.json").is_file()


@pytest.mark.parametrize("name", ["latest", "my-favourite"])
def test_a_checkpoint_may_have_any_name(run, tmp_path, name):
    """Its step is in its state."""
    alone = shutil.copytree(run / "checkpoint-6", tmp_path / name)
    found = resumed(tmp_path / "out", alone)
    assert (found.checkpoint, found.resumed, found.start) == (alone, 6, 6)


def test_a_latest_that_is_no_copy_of_its_neighbours_is_a_checkpoint_of_its_own(copied):
    (copied / "checkpoint-6" / "SHA256SUMS").unlink()
    assert followed(copied / "latest") == copied / "latest"
    assert resumed(copied, copied / "latest").resumed == 6


def test_auto_does_not_pass_over_a_latest_that_is_newer_than_all_others(copied):
    shutil.rmtree(copied / "checkpoint-6")
    message = refusal(copied, "auto")
    assert f"{copied / 'latest'} is no link but a checkpoint of micro step 6" in message
    assert "rename it to checkpoint-6" in message
    (copied / "latest").rename(copied / "checkpoint-6")
    assert resumed(copied, "auto").resumed == 6


@pytest.mark.parametrize("spoil", ["emptied", "older"])
def test_another_latest_does_not_stop_a_run(copied, spoil):
    if spoil == "emptied":
        (copied / "latest" / "training_state.json").write_text("")
    else:
        checkpoint_of(copied, 9, "--output_dir", copied)
    assert resumed(copied, "auto").resumed == (6 if spoil == "emptied" else 9)


@pytest.mark.parametrize("name", ["checkpoint-500", "latest"])
def test_nothing_is_advised_that_is_not_there(tmp_path, name):
    empty = tmp_path / name
    assert refusal(tmp_path, empty).endswith(f"{empty} does not exist")
    empty.mkdir()
    message = refusal(tmp_path, empty)
    assert f"{empty} has no training_state.json, expected a whole checkpoint" in message
    assert "--student_model" not in message and "checkpoint-6" not in message
    empty.rmdir()
    empty.touch()
    assert "is a file, expected the folder of a checkpoint" in refusal(tmp_path, empty)


def test_an_empty_checkpoint_is_not_passed_over_in_silence(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    message = refusal(tmp_path, "auto")
    assert "checkpoint-500 has no training_state.json" in message and "--student_model" not in message


def test_what_is_there_is_advised(run):
    for wrong in (run, run / "checkpoint-7"):
        assert refusal(run, wrong).endswith(f"{run} has checkpoint-6, checkpoint-2")
    (run / "checkpoint-6" / "training_state.json").unlink()  # a folder with weights
    assert f"--student_model {run / 'checkpoint-6'}" in refusal(run, run / "checkpoint-6")


def test_a_checkpoint_that_may_not_be_read_is_one_line(run, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("checkpointing.resume.quick_check", refuse)
    assert "cannot be read ([Errno 13] Permission denied" in refusal(run, run / "latest")
