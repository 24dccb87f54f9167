"""What doctor.py finds about checkpoints, disk, memory and trackers."""

import dataclasses
import errno
import os
import re
import resource
import shutil
import tempfile

import pytest

from checkpointing import files
from checkpointing.files import STATE_FILE, checkpoint_bytes
from preflight.checks import models, storage
from preflight.checks.basics import OK, WARNING, PlannedRun, run_check
from tests.preflight.cases import checkpoint_of, found, full_disk, planned, raise_, statuses, the_bad_one
from utils import lock_dir


def test_an_output_dir_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    bad = the_bad_one(found(storage.check_output_dir, "--output_dir", tmp_path / "file" / "run"))
    assert f"{tmp_path / 'file'} cannot be written" in bad.found

    def read_only(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    bad = the_bad_one(found(storage.check_output_dir, "--output_dir", tmp_path / "run"))
    assert "Read-only file system" in bad.found


def test_an_output_dir_that_takes_no_checkpoint(tmp_path, monkeypatch):
    """The doctor tries what a run tries."""

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    options = ("--output_dir", tmp_path / "run")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (10_000, 10_000))
    assert "ulimit -f unlimited" in the_bad_one(found(storage.check_disk, *options)).remedy
    monkeypatch.setattr(files, "save_file", read_only)
    assert "no checkpoint can be written" in the_bad_one(found(storage.check_output_dir, *options)).found
    bad = the_bad_one(found(storage.check_output_dir, "--output_dir", tmp_path / os.fsdecode(b"\xff")))
    assert "not UTF-8" in bad.found
    assert list(tmp_path.iterdir()) == []


def test_an_output_dir_that_holds_another_run(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    options = ("--output_dir", tmp_path)
    assert "--resume auto" in the_bad_one(found(storage.check_output_dir, *options)).remedy
    for more in (("--resume", "auto"), ("--resume_step", 5)):
        assert statuses(found(storage.check_output_dir, *options, *more)) == [OK]
    (tmp_path / "checkpoint-5").rename(tmp_path / "checkpoint-0")
    assert "up to checkpoint-0" in the_bad_one(found(storage.check_output_dir, *options)).found


def test_newer_checkpoints_than_the_one_to_resume_from(tmp_path):
    old, new = (checkpoint_of(tmp_path, step) for step in (2, 6))
    options = ("--output_dir", tmp_path, "--resume")
    assert "up to checkpoint-6" in the_bad_one(found(storage.check_output_dir, *options, old)).found
    assert statuses(found(storage.check_output_dir, *options, new)) == [OK]
    (new / STATE_FILE).write_text("{")
    assert "up to checkpoint-6" in the_bad_one(found(storage.check_output_dir, *options, old)).found
    findings = found(storage.check_output_dir, *options, "auto")  # a run sets it aside
    assert findings[0].status == OK and "checkpoint-6 is bad" in the_bad_one(findings, WARNING).found


def test_an_output_dir_of_a_run_that_is_running(tmp_path):
    options = ("--output_dir", tmp_path)
    with lock_dir("--output_dir", tmp_path):
        assert "another run is writing" in the_bad_one(found(storage.check_output_dir, *options)).found
    (tmp_path / ".lock").write_text("kept")
    assert statuses(found(storage.check_output_dir, *options)) == [OK]
    assert (tmp_path / ".lock").read_text() == "kept"
    lock_dir("--output_dir", tmp_path).close()
    (tmp_path / ".lock").rename(tmp_path / "elsewhere")
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    assert "remove it" in the_bad_one(found(storage.check_output_dir, *options)).found


def test_a_log_file_that_cannot_be_written(tmp_path):
    assert found(storage.check_log_file) == []
    (tmp_path / "log").write_text("before")
    for file in (tmp_path / "log", tmp_path / "new" / "log"):
        assert statuses(found(storage.check_log_file, "--log_file", file)) == [OK]
    for file in (tmp_path, tmp_path / "log" / "log"):
        assert "cannot be written" in the_bad_one(found(storage.check_log_file, "--log_file", file)).found
    assert [file.name for file in tmp_path.iterdir()] == ["log"] and (tmp_path / "log").read_text() == "before"


def test_a_full_disk(tmp_path, monkeypatch):
    options = ("--output_dir", tmp_path / "run", "--save_total_limit", 1)
    assert statuses(found(storage.check_disk, *options)) == [OK]
    monkeypatch.setattr(shutil, "disk_usage", full_disk(20_000_000))
    assert "expected room for two" in the_bad_one(found(storage.check_disk, *options)).found
    monkeypatch.setattr(shutil, "disk_usage", full_disk(30_000_000))
    options = ("--output_dir", tmp_path / "run", "--max_steps", 100000)
    assert "--save_total_limit" in the_bad_one(found(storage.check_disk, *options), WARNING).found
    assert not (tmp_path / "run").exists()


def test_room_for_what_a_run_has_still_to_save(tmp_path, monkeypatch):
    """--resume_step counts micro steps, --max_steps optimizer steps; what is there already has its room."""
    size = checkpoint_bytes(models.skeletons(planned())[1])
    monkeypatch.setattr(shutil, "disk_usage", full_disk(int(3.5 * size)))
    options = ("--output_dir", tmp_path, "--max_steps", 10, "--grad_accumulation_steps", 4, "--save_interval", 8)
    bad = the_bad_one(found(storage.check_disk, *options, "--resume_step", 8), WARNING)
    assert "keeps up to 5" in bad.found
    assert statuses(found(storage.check_disk, *options, "--resume_step", 24)) == [OK]
    checkpoint_of(tmp_path, 24, *options)
    assert statuses(found(storage.check_disk, *options, "--resume", "auto")) == [OK]
    monkeypatch.setattr(shutil, "disk_usage", full_disk(int(1.5 * size)))
    limit = ("--save_total_limit", 1)
    (room,) = found(storage.check_disk, *options, *limit, "--resume", "auto")
    assert room.status == OK and "1 are there, 1 more fit" in room.found


def test_little_host_memory(tmp_path, monkeypatch):
    assert statuses(found(storage.check_host_memory)) == [OK]
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(storage, "MEMORY_LIMIT", limit)
    limit.write_text("max\n")
    assert statuses(found(storage.check_host_memory)) == [OK]
    limit.write_text("25000000\n")
    assert "--no_background_save" in the_bad_one(found(storage.check_host_memory), WARNING).remedy
    assert statuses(found(storage.check_host_memory, "--no_background_save")) == [OK]
    assert "more memory" in the_bad_one(found(storage.check_host_memory, nproc=8), WARNING).remedy


def test_a_colocated_teacher_is_in_memory_once_a_rank():
    def held(*options):
        (finding,) = found(storage.check_host_memory, *options, nproc=100)
        return float(re.search(r"takes ([\d.e+]+) GB", finding.found)[1])

    teacher, _ = models.skeletons(planned())
    of_one = sum(p.nbytes for p in teacher.parameters()) / 1e9
    assert held("--teacher_placement", "colocated") - held() == pytest.approx(99 * of_one, rel=0.1)


def test_wandb_without_login_or_network(monkeypatch):
    wandb = pytest.importorskip("wandb")
    online = ("--wandb", "--wandb_mode", "online")
    assert found(storage.check_wandb) == []
    monkeypatch.setattr(wandb, "login", lambda **_: raise_(wandb.errors.UsageError("api_key not configured")))
    bad = the_bad_one(run_check("--wandb", storage.check_wandb, planned(*online)))
    assert bad.found == "W&B does not start (api_key not configured)" and "wandb login" in bad.remedy
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    (well,) = found(storage.check_wandb, *online)
    assert well.status == OK and well.found.startswith("online")


def test_wandb_has_the_mode_of_the_run(monkeypatch):
    """As `wandb offline` leaves it, too."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "login", lambda **_: pytest.fail("needs no login"))
    assert "offline" in found(storage.check_wandb, "--wandb")[0].found  # the preset touches no network
    monkeypatch.setattr(wandb.setup().settings, "mode", "offline")
    args = dataclasses.replace(planned("--wandb").args, local_files_only=False)
    (well,) = run_check("name", storage.check_wandb, PlannedRun(args))
    assert well.status == OK and "offline, needs no login" in well.found and "wandb sync" in well.found


def test_trackers_without_their_packages(monkeypatch):
    assert statuses(found(storage.check_tensorboard, "--tensorboard")) == [OK]
    both = ("--wandb", "--tensorboard")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for check, package in (
        (storage.check_wandb, "wandb"),
        (storage.check_tensorboard, "tensorboard"),
    ):
        assert f"the package {package} is not installed" in the_bad_one(found(check, *both)).found
