"""resume.py and health.py in small: room on the disk, which options may change, and losses that stand out. What a whole
run does is in test_faults.py.
"""

import dataclasses
import errno
import random
import re
import shutil
from collections import namedtuple

import pytest

from arguments import parse_train_args
from checkpointing import resume
from checkpointing.files import checkpoint_bytes
from checkpointing.resume import check_same_run
from checkpointing.run_folder import check_space, explaining_write_errors, save_options
from checkpointing.state import RunState
from monitoring.health import SpikeWatch
from tests.preflight.cases import checkpoint_of
from tests.tiny import tiny_student

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def disk(monkeypatch):
    """Sets how many checkpoints of a tiny student the disk has room for; returns it."""
    student = tiny_student()

    def has_room_for(n):
        free = int(n * checkpoint_bytes(student))
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, free))
        return student

    return has_room_for


def args(*argv):
    return parse_train_args(["--preset", "tiny", "--output_dir", "out", *argv])


@pytest.mark.parametrize("n,argv", [(1.9, ()), (1.9, ("--save_total_limit", "1")), (0, ("--save_interval", "0"))])
def test_a_run_needs_room_for_two_checkpoints(disk, n, argv):
    with pytest.raises(ValueError, match="--output_dir out: .* expected room for two at least; make room"):
        check_space(args(*argv), disk(n), 100)


@pytest.mark.parametrize(
    "n,argv,warned",
    [
        (10.9, ("--save_interval", "10"), "up to 11"),  # the first, and ten
        (11, ("--save_interval", "10"), None),
        (11.9, ("--save_interval", "9"), "up to 13"),  # the last, too
        (3.9, ("--save_interval", "10", "--save_total_limit", "3"), "up to 4"),
        (4, ("--save_interval", "10", "--save_total_limit", "3"), None),
        (2, ("--save_interval", "0"), None),
    ],
)
def test_too_little_room_for_all_is_reported(disk, caplog, monkeypatch, n, argv, warned):
    monkeypatch.setattr(resume.logger, "propagate", True)
    check_space(args(*argv), disk(n), 100)
    assert (warned in caplog.text and "--save_total_limit" in caplog.text) if warned else caplog.text == ""


def test_a_resumed_run_needs_room_for_one_more(disk, tmp_path, caplog, monkeypatch):
    """The checkpoints that it keeps are on the disk already."""
    monkeypatch.setattr(resume.logger, "propagate", True)
    argv = ("--output_dir", str(tmp_path), "--save_interval", "10", "--save_total_limit", "3")
    for step in (10, 20, 30):
        (tmp_path / f"checkpoint-{step}").mkdir()
    check_space(args(*argv), disk(1.2), 100)
    assert caplog.text == ""
    with pytest.raises(
        ValueError, match="3 are there and the disk has room for 0 more, expected room for one more at least"
    ):
        check_space(args(*argv), disk(0.9), 100)


def test_what_cannot_be_written_before_training_is_one_line(tmp_path):
    message = f"--output_dir {tmp_path}: cannot be written \\(No space left on device\\)"
    with pytest.raises(ValueError, match=message), explaining_write_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def checkpoint(tmp_path):
    """Returns the checkpoint and the state of a run of two ranks with the options given."""
    return lambda *argv: (tmp_path, {"arguments": dataclasses.asdict(args(*argv)), "world_size": 2})


def test_options_that_make_another_run_are_listed_together(checkpoint):
    before = checkpoint("--no_dataset_streaming")
    with pytest.raises(ValueError) as error:
        check_same_run(*before, args("--no_dataset_streaming", "--seed", "7", "--seq_length", "99", "--freeze_mlp"), 3)
    text = str(error.value)
    assert "--seed 7" in text and "has 0; give the same" in text
    assert "--seq_length 99" in text and "--freeze_mlp True" in text
    assert "--nproc_per_node" not in text  # cached data does not mind


@pytest.mark.parametrize("change", [("--batch_size", "3"), ("--shuffle_buffer", "3")])
def test_a_stream_keeps_its_batches_and_its_buffer(checkpoint, change):
    before = checkpoint("--dataset_streaming")
    with pytest.raises(ValueError, match=change[0]):
        check_same_run(*before, args("--dataset_streaming", *change), 2)
    check_same_run(*checkpoint("--no_dataset_streaming"), args("--no_dataset_streaming", *change), 2)


def test_what_may_change_is_logged_and_how_a_run_is_watched_is_not(checkpoint, caplog, monkeypatch):
    monkeypatch.setattr(resume.logger, "propagate", True)
    check_same_run(*checkpoint(), args("--max_lr", "0.5", "--log_interval", "3", "--time_limit", "9"), 2)
    assert "resuming with --max_lr 0.5 where the run had" in caplog.text
    assert "log_interval" not in caplog.text and "time_limit" not in caplog.text


def test_an_earlier_version_had_neither_of_these_rates(checkpoint, caplog, monkeypatch):
    monkeypatch.setattr(resume.logger, "propagate", True)
    folder, state = checkpoint()
    for name in ("stage", "copied_lr_factor", "warmup_steps"):
        state["arguments"].pop(name)
    check_same_run(folder, state, args(), 2)
    assert not caplog.records
    check_same_run(folder, state, args("--copied_lr_factor", "0.1", "--warmup_steps", "3"), 2)
    assert "--copied_lr_factor 0.1 where the run had 1.0" in caplog.text
    assert "--warmup_steps 3 where the run had None" in caplog.text


def test_only_a_separator_is_left_to_the_checkpoint(checkpoint):
    """A run may be given a column, or a name, that is called so."""
    with pytest.raises(ValueError, match="--dataset_text_field auto: the run of .* has text"):
        check_same_run(*checkpoint(), args("--dataset_text_field", "auto", "--document_separator", "auto"), 2)


def separator_of_resumed(folder, recorded, given):
    """Returns what ends a document in a run that resumes with option `given` from a checkpoint that has recorded
    `recorded`; None: it is of an earlier version, and <eos> ended them.
    """
    without = ("document_separator",) if recorded is None else ()
    checkpoint = checkpoint_of(folder, 4, "--document_separator", recorded or "auto", without=without)
    found = resume.Resume(args("--resume", str(checkpoint), "--document_separator", given), 1)
    return found.document_separator("<eos>")


@pytest.mark.parametrize(
    ("recorded", "given", "separator"),
    [("<sep>", "auto", "<sep>"), ("<sep>", "<sep>", "<sep>"), (None, "auto", "<eos>"), (None, "<eos>", "<eos>")],
)
def test_a_resumed_run_keeps_what_ends_a_document(tmp_path, recorded, given, separator):
    assert separator_of_resumed(tmp_path, recorded, given) == separator


@pytest.mark.parametrize(("recorded", "given"), [("<sep>", "<eos>"), (None, "<sep>")])
def test_a_resumed_run_is_given_no_other(tmp_path, recorded, given):
    expected = f"--document_separator {given}: the run of .* has {recorded or '<eos>'}; give the same"
    with pytest.raises(ValueError, match=rf"this would be another run:\n  {expected}"):
        separator_of_resumed(tmp_path, recorded, given)


def test_a_new_run_has_what_its_options_say():
    assert resume.Resume(args("--document_separator", "<sep>"), 1).document_separator("<eos>") == "<sep>"


def test_other_versions_of_packages_are_logged(caplog, monkeypatch):
    monkeypatch.setattr(resume.logger, "propagate", True)
    state = RunState().to_json(args(), 2)
    for same in (state, {}, {"versions": {"torch": state["versions"]["torch"]}}):
        resume.log_versions(same)
    assert caplog.text == "" and {"python", "torch", "transformers"} < state["versions"].keys()
    resume.log_versions({"versions": {**state["versions"], "transformers": "5.0.0"}})
    assert re.search(r"another version of transformers [\d.]+ \(it had 5\.0\.0\): what follows may differ", caplog.text)


def test_a_loss_stands_out_only_of_enough_others_and_by_much():
    dice = random.Random(0)
    watch = SpikeWatch()
    assert not watch.is_spike(50.0)  # the first of a run is always the highest
    usual = [2 + dice.gauss(0, 0.1) for _ in range(200)]
    assert sum(watch.is_spike(loss) for loss in usual) == 0
    assert watch.is_spike(3.5) and watch.is_spike(3.5)  # one does not hide the next
    assert not watch.is_spike(0.5)  # below is no trouble


def test_options_of_earlier_starts_are_kept(tmp_path):
    for options in ("seed: 0\n", "seed: 0\n", "seed: 1\n", "seed: 2\n"):
        save_options(tmp_path, options)
    found = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert found == {"args.yaml": "seed: 2\n", "args.1.yaml": "seed: 0\n", "args.2.yaml": "seed: 1\n"}
