"""The output directory before a run: new, its own, another run's, locked, not writable."""

import errno
import os
import re
import resource
import time

import pytest

import utils
from checkpointing import files
from checkpointing.run_folder import check_file_limit, check_writable, prepare_output_dir
from tests import fresh
from tests.parsing import options_in
from tests.tiny import tiny_student
from utils import lock_dir, setup_logging


@pytest.fixture
def prepare():
    """Returns prepare_output_dir, whose locks are released after the test. `start`: the step of the checkpoint that the
    run resumes from, if any.
    """
    locks = []

    def prepare(folder, start=None, *more):
        locks.append(prepare_output_dir(options_in(folder, *more), start))
        return locks[-1]

    yield prepare
    for lock in locks:
        lock.close()


def names(folder):
    """Returns all names but the lock's."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_fresh_output_directory(tmp_path, prepare):
    folder = tmp_path / "a" / "b"
    prepare(folder).close()
    assert folder.is_dir() and names(folder) == []
    prepare(folder)  # it may exist


def test_an_output_directory_that_cannot_be_written(tmp_path, prepare):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=re.escape(f"--output_dir {path}: cannot be written (")):
            prepare(path)


@pytest.mark.parametrize(
    "steps,start,line",
    [
        ([0], None, ""),
        ([30], None, ""),
        ([10, 30], None, "--resume_step 10"),
        ([30], None, "--resume_step 10"),
        ([0, 11], None, "--resume_step 10"),
        ([10, 30], 10, "--resume checkpoint-10"),
        ([0, 10], 0, "--resume checkpoint-0"),
    ],
)
def test_results_of_another_run_are_not_overwritten(tmp_path, prepare, steps, start, line):
    for step in steps:
        (tmp_path / f"checkpoint-{step}").mkdir()
    before = names(tmp_path)
    with pytest.raises(ValueError) as error:
        prepare(tmp_path, start, *line.split())
    message = str(error.value)
    assert f"--output_dir {tmp_path}: holds checkpoints up to checkpoint-{max(steps)}, " in message
    assert "--resume auto" in message
    assert names(tmp_path) == before
    lock_dir("--output_dir", tmp_path).close()  # who is refused holds no lock


@pytest.mark.parametrize(
    "steps,start,line",
    [
        *((steps, None, "--resume_step 10") for steps in ([], [0], [0, 5], [10], [0, 5, 10])),
        *((steps, 10, "--resume auto") for steps in ([], [0], [0, 5], [10], [0, 5, 10])),
        ([0], 0, "--resume auto"),
    ],
)
def test_a_run_resumes_where_its_own_checkpoints_are(tmp_path, prepare, steps, start, line):
    for step in steps:
        (tmp_path / f"checkpoint-{step}").mkdir()
    prepare(tmp_path, start, *line.split())
    assert len(names(tmp_path)) == len(steps)


def test_newer_checkpoints_that_are_bad_and_what_dead_saves_left_are_out_of_the_way(tmp_path, prepare):
    for name in ("checkpoint-10", "checkpoint-20", "checkpoint-30", ".partial-checkpoint-40-0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    prepare(tmp_path, 10, "--resume", "auto")
    assert names(tmp_path) == ["bad-checkpoint-20", "bad-checkpoint-30", "checkpoint-10"]
    assert all((tmp_path / name / "file").exists() for name in names(tmp_path))


def test_a_checkpoint_that_was_moved_aside_is_not_in_the_way(tmp_path, prepare):
    (tmp_path / "checkpoint-30.old").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "bad-checkpoint-30").mkdir()
    assert not prepare(tmp_path).closed  # the lock is held


def test_two_runs_do_not_write_to_one_directory(tmp_path, prepare):
    lock = prepare(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"--output_dir {tmp_path}: another run is writing there")):
        prepare(tmp_path)
    lock.close()
    prepare(tmp_path)


def hold_the_lock(folder):
    lock = lock_dir("--output_dir", folder)
    print("held" if not lock.closed else "free", flush=True)
    time.sleep(600)


def test_a_run_that_was_killed_holds_no_lock(tmp_path, prepare):
    with fresh.started(hold_the_lock, tmp_path) as holder:
        while "held" not in holder.written():
            assert holder.process.is_alive(), holder.written()
            time.sleep(0.01)
        with pytest.raises(ValueError, match="another run is writing there"):
            prepare(tmp_path)
        holder.process.kill()
        holder.process.join()
        prepare(tmp_path)


def test_a_disk_without_locks_is_no_hindrance(tmp_path, prepare, monkeypatch, capsys):
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    setup_logging(None, is_main=True)
    monkeypatch.setattr(utils.fcntl, "flock", refuse)
    prepare(tmp_path)
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


# --- what no room cures --------------------------------------------------------------------------------------


def test_a_path_that_is_not_utf8_is_refused_before_anything_is_made(tmp_path, prepare):
    folder = tmp_path / os.fsdecode(b"run-\xff")
    with pytest.raises(ValueError, match=r"run-\\xff: the path has a byte that is not UTF-8"):
        prepare(folder)
    assert not folder.exists()


@pytest.mark.parametrize("owner,name", [(files, "save_file"), (files, "flush_to_disk"), (files.Path, "rename")])
def test_a_folder_that_refuses_what_a_save_does(tmp_path, monkeypatch, owner, name):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    check_writable(tmp_path)
    monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(ValueError, match=f"--output_dir {tmp_path}: no checkpoint can be written .*Read-only"):
        check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_limit_for_files_that_a_checkpoint_exceeds(tmp_path, monkeypatch):
    student = tiny_student()
    needed = files.largest_file(student, 2)
    for limit, fits in ((needed, True), (needed - 1, False), (resource.RLIM_INFINITY, True)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limit=limit: (limit, limit))
        if fits:
            check_file_limit(tmp_path, student, 2)
        else:
            with pytest.raises(ValueError, match="files of this process are limited to .*ulimit -f unlimited"):
                check_file_limit(tmp_path, student, 2)
