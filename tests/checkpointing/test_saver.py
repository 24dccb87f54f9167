"""What becomes of a save that fails: which errors last, what is logged and by whom, and how long the end waits."""

import errno
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from checkpointing import saver as saver_module
from checkpointing.saver import LAST_TRIES, REPAIR_WAIT_S, ROOM_WAIT_S, Saver
from checkpointing.state import RunState
from checkpointing.write_errors import may_pass
from tests.parsing import options_in

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
READ_ONLY = OSError(errno.EROFS, os.strerror(errno.EROFS))


def raised_by(act, *args):
    """Returns the error of a library, as it is."""
    with pytest.raises(Exception) as error:
        act(*args)
    return error.value


# --- which errors last ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EIO", "ENOMEM", "ESTALE", "ETIMEDOUT", "ENOENT"])
def test_room_and_servers_come_back(number):
    code = getattr(errno, number)
    assert may_pass(OSError(code, os.strerror(code)))
    assert may_pass(SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})"))


@pytest.mark.parametrize("number", ["EROFS", "EACCES", "EPERM", "ENAMETOOLONG", "EINVAL", "EFBIG", "EXDEV", "ENOTDIR"])
def test_what_lasts_until_it_is_corrected(number):
    code = getattr(errno, number)
    assert not may_pass(OSError(code, os.strerror(code)))
    assert not may_pass(SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})"))


def test_errors_without_a_number():
    assert may_pass(MemoryError()) and may_pass(RuntimeError("can't allocate memory"))
    unencodable = raised_by("\udcff".encode)
    assert not may_pass(unencodable) and not may_pass(TypeError("a mistake in the code"))


def test_the_errors_of_safetensors_and_tokenizers_have_the_numbers_that_are_read(tmp_path):
    tensors, tokenizer = {"a": torch.zeros(1)}, Tokenizer(models.WordLevel({"a": 0}, "a"))
    name = "x" * 300  # ENAMETOOLONG lasts
    assert not may_pass(raised_by(save_file, tensors, tmp_path / name))
    assert not may_pass(raised_by(tokenizer.save, str(tmp_path / name)))
    absent = tmp_path / "absent" / "file"  # ENOENT may pass
    assert may_pass(raised_by(save_file, tensors, absent)) and may_pass(raised_by(tokenizer.save, str(absent)))


# --- the ranks of a run --------------------------------------------------------------------------------------


class Stub:
    """Stands for the Ranks of a rank: `reasons` is what each hands in, at the same place."""

    def __init__(self, rank, reasons):
        self.rank, self.world_size, self.is_main, self.reasons = rank, len(reasons), rank == 0, reasons

    def maximum(self, *own):
        return list(own)

    def gather(self, item):
        return self.reasons if self.is_main else []


@pytest.fixture
def savers(tmp_path, monkeypatch):
    """Returns a function that makes the savers of as many ranks as there are errors. Each rank's parts raise its error,
    or are written if it is None. `saved`: as of Saver.
    """
    made = []
    monkeypatch.setattr(saver_module, "publish", lambda partial, folder, step: new_checkpoint(folder, step))

    def make(*errors, saved=-1, options=()):
        args = options_in(tmp_path, "--preset", "tiny", *options)
        reasons = [error and f"{type(error).__name__}: {error}" for error in errors]
        for rank, error in enumerate(errors):
            saver = Saver(args, None, None, None, Stub(rank, reasons), saved)
            saver._prepare = lambda state, error=error: lambda: raise_(error)
            made.append(saver)
        return list(made)

    yield make
    for saver in made:
        saver.thread.close()


def new_checkpoint(folder, step):
    (folder / f"checkpoint-{step}").mkdir()
    return folder / f"checkpoint-{step}"


def raise_(error):
    if error is not None:
        raise error


def advance(savers):
    """Advances all ranks by their agreement, once none of them is busy."""
    for saver in savers:
        if saver.pending is not None:
            saver.pending.exception(60)
    agreed = [max(values) for values in zip(*(saver.status() for saver in savers), strict=True)]
    for saver in reversed(savers):  # rank 0 may raise
        saver.advance(*agreed)


@pytest.mark.parametrize("errors", [(FULL, FULL, FULL), (None, FULL, READ_ONLY), (None, None, READ_ONLY)])
def test_a_failed_save_is_logged_once(savers, caplog, errors):
    ranks = savers(*errors, saved=0)
    for saver in ranks:
        saver.save(RunState(micro_step=6, step=6))
    advance(ranks)
    (logged,) = (message for message in caplog.messages if "could not be written" in message)
    rank, first = next((rank, error) for rank, error in enumerate(errors) if error is not None)
    assert f"checkpoint of micro step 6 could not be written by rank {rank} (OSError: {first})" in logged
    assert "training continues and the save is repeated at step 8" in logged
    assert {saver.lasts for saver in ranks} == {READ_ONLY in errors}  # all agree, whoever found it
    assert {(saver.saving, saver.retry_at) for saver in ranks} == {(None, 8)}


def test_a_first_checkpoint_that_no_room_would_help_ends_the_run(savers, tmp_path):
    ranks = savers(None, READ_ONLY, FULL)
    for saver in ranks:
        saver.save(RunState())
    with pytest.raises(ValueError, match=f"--output_dir {tmp_path}: .* by rank 1 .*Read-only.*choose another"):
        advance(ranks)


def test_a_first_checkpoint_waits_for_room(savers, caplog):
    (saver,) = savers(FULL)
    saver.save(RunState())
    advance([saver])
    assert "the save is repeated at step 2" in caplog.text and "it has no checkpoint" in caplog.text


# --- the end of a run ----------------------------------------------------------------------------------------


class Clock:
    """Stands for the module `time`: sleeping takes none."""

    def __init__(self, then=lambda now: None):
        self.now, self.then = 0.0, then

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.then(self.now)


NOBODY, SOMEBODY = SimpleNamespace(code=0), SimpleNamespace(code=1)  # has asked to stop
FOREGROUND = ("--no_background_save",)


@pytest.mark.parametrize("error,patience", [(FULL, ROOM_WAIT_S), (READ_ONLY, REPAIR_WAIT_S)])
def test_the_end_waits_for_room_and_less_long_for_what_lasts(savers, monkeypatch, caplog, error, patience):
    (saver,) = savers(error, saved=4, options=FOREGROUND)
    clock = Clock()
    monkeypatch.setattr(saver_module, "time", clock)
    with pytest.raises(OSError, match=r"could not be saved in \d+ tries .*newest checkpoint is that of micro step 4"):
        saver.finish(RunState(micro_step=6, step=6), NOBODY)
    assert patience < clock.now < patience + 100
    waits = [message for message in caplog.messages if "could not be written" in message]
    assert len(waits) == len(caplog.messages)  # one line a try
    assert all("waits up to" in message and error.strerror in message for message in waits)


def test_what_is_corrected_meanwhile_is_saved(savers, monkeypatch, tmp_path):
    (saver,) = savers(READ_ONLY, saved=4, options=FOREGROUND)

    def correct(now):
        if now > REPAIR_WAIT_S / 2:
            saver._prepare = lambda state: lambda: None

    monkeypatch.setattr(saver_module, "time", Clock(correct))
    saver.finish(RunState(micro_step=6, step=6), NOBODY)
    assert saver.saved == 6 and (tmp_path / "checkpoint-6").is_dir()


def test_who_is_asked_to_stop_tries_a_few_times(savers, monkeypatch):
    (saver,) = savers(FULL, saved=4, options=FOREGROUND)
    monkeypatch.setattr(saver_module, "time", Clock())
    with pytest.raises(OSError, match=f"in {LAST_TRIES} tries"):
        saver.finish(RunState(micro_step=6, step=6), SOMEBODY)


# --- after a save --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["point_latest_to", "keep_newest"])
def test_the_link_and_old_checkpoints_do_not_wait_for_one_another(savers, monkeypatch, caplog, tmp_path, fails):
    (saver,) = savers(None, saved=4, options=(*FOREGROUND, "--save_total_limit", "1"))
    new_checkpoint(tmp_path, 4)
    monkeypatch.setattr(saver_module, fails, lambda *args: raise_(READ_ONLY))
    saver.save(RunState(micro_step=6, step=6))
    assert saver.saved == 6 and "Read-only file system" in caplog.text
    assert (tmp_path / "latest").is_symlink() is (fails != "point_latest_to")
    assert (tmp_path / "checkpoint-4").exists() is (fails == "keep_newest")
