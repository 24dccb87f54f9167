"""The folder of checkpoints: the newest, those kept, the bad ones, the link, and what is in the way."""

import os
import shutil
from pathlib import Path

import pytest

from checkpointing.files import find_checkpoints, step_of
from checkpointing.housekeeping import keep_newest, point_latest_to, remove_partial, set_bad_aside
from tests.checkpointing.saved_checkpoints import Killed, fail, visible


@pytest.fixture
def numbered(tmp_path):
    """Returns a directory with checkpoints, each with its step in a file, and with folders that are no checkpoints."""
    for step in (0, 5, 10, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "step").write_text(str(step))
    for name in ("checkpoint-best", "checkpoint-30.old", "bad-checkpoint-7", ".partial-checkpoint-200-0", "wandb"):
        (tmp_path / name).mkdir()
    return tmp_path


def steps(folder):
    return [step_of(path) for path in find_checkpoints(folder)]


def test_the_newest_is_the_first(numbered):
    assert steps(numbered) == [100, 20, 10, 5, 0]
    assert find_checkpoints(numbered / "absent") == []


@pytest.mark.parametrize("limit,kept", [(1, [100]), (2, [100, 20]), (4, [100, 20, 10, 5]), (9, [100, 20, 10, 5, 0])])
def test_the_newest_are_kept_and_nothing_else_is_touched(numbered, limit, kept):
    others = {path.name for path in numbered.iterdir()} - set(visible(numbered)) | {"checkpoint-best"}
    keep_newest(numbered, limit)
    assert steps(numbered) == kept
    assert others <= {path.name for path in numbered.iterdir()}
    assert all(
        (path / "step").read_text() == path.name.removeprefix("checkpoint-") for path in find_checkpoints(numbered)
    )
    assert not list(numbered.glob(".deleted-*"))


def test_a_deletion_that_is_cut_short_leaves_no_half_checkpoint(numbered, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", fail)
        keep_newest(numbered, 4)
    assert steps(numbered) == [100, 20, 10, 5]
    assert (numbered / ".deleted-checkpoint-0").is_dir()
    remove_partial(numbered)
    assert not list(numbered.glob(".*"))
    assert steps(numbered) == [100, 20, 10, 5]


def test_bad_ones_are_moved_aside_and_never_over_one_another(tmp_path, caplog):
    for content in ("first", "second", "third"):
        path = tmp_path / "checkpoint-7"
        path.mkdir()
        (path / "file").write_text(content)
        set_bad_aside(path, f"{content} is bad")
        assert find_checkpoints(tmp_path) == []
        assert f"({content} is bad)" in caplog.messages[-1]
    names = ["bad-checkpoint-7", "bad-checkpoint-7-2", "bad-checkpoint-7-3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [(tmp_path / name / "file").read_text() for name in names] == ["first", "second", "third"]


def test_latest_names_the_newest(numbered):
    for step in (5, 20):
        point_latest_to(numbered / f"checkpoint-{step}")
        assert (numbered / "latest" / "step").read_text() == str(step)
        assert os.readlink(numbered / "latest") == f"checkpoint-{step}"  # also where the directory is moved
    (numbered / ".latest").symlink_to("nowhere")  # as a crash between two steps leaves it
    point_latest_to(numbered / "checkpoint-100")
    assert os.readlink(numbered / "latest") == "checkpoint-100"
    assert steps(numbered) == [100, 20, 10, 5, 0] and not (numbered / ".latest").is_symlink()


@pytest.mark.parametrize("name", ["latest", ".latest"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_stands_in_the_place_of_the_link_is_moved_aside(numbered, caplog, name, kind):
    """As `cp -rL` and object stores make it of a link; and once more, by a second copy."""
    for n, aside in ((5, "latest-copy"), (20, "latest-copy-2")):
        (numbered / name).unlink(missing_ok=True)
        if kind == "folder":
            shutil.copytree(numbered / "checkpoint-10", numbered / name)
        else:
            (numbered / name).write_text("10")
        point_latest_to(numbered / f"checkpoint-{n}")
        assert os.readlink(numbered / "latest") == f"checkpoint-{n}" and not (numbered / ".latest").exists()
        kept = numbered / aside / "step" if kind == "folder" else numbered / aside
        assert kept.read_text() == "10"
        assert f"moved to {aside}" in caplog.messages[-1]


def refuse(monkeypatch, name, *bad):
    """Has a method of Path raise for the paths of these names."""
    real = getattr(Path, name)

    def act(path, *args, **kwargs):
        if path.name in bad:
            raise PermissionError(1, "Operation not permitted", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, name, act)


def test_a_checkpoint_that_cannot_be_deleted_keeps_no_other_from_it(numbered, monkeypatch, caplog):
    refuse(monkeypatch, "rename", "checkpoint-20")
    keep_newest(numbered, 1)
    assert steps(numbered) == [100, 20]
    assert [message for message in caplog.messages if "checkpoint-20 cannot be deleted" in message]


def test_what_could_not_be_deleted_is_deleted_by_the_next_save(numbered, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: refused(path))
        keep_newest(numbered, 3)
    assert {path.name for path in numbered.glob(".deleted-*")} == {".deleted-checkpoint-0", ".deleted-checkpoint-5"}
    keep_newest(numbered, 3)
    assert not list(numbered.glob(".deleted-*")) and steps(numbered) == [100, 20, 10]


def refused(path):
    raise OSError(16, "Device or resource busy", str(path))


def test_what_a_link_points_to_is_never_deleted(numbered, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "mine").touch()
    for name in (".partial-checkpoint-3-0", ".deleted-checkpoint-2", "checkpoint-1"):
        (numbered / name).symlink_to(elsewhere)
    (numbered / ".partial-checkpoint-4-0").write_text("a file")
    (numbered / ".partial-checkpoint-6-0").symlink_to("nowhere")
    remove_partial(numbered)
    assert not list(numbered.glob(".*")) and (elsewhere / "mine").exists()
    keep_newest(numbered, 4)
    assert steps(numbered) == [100, 20, 10, 5] and (elsewhere / "mine").exists()
