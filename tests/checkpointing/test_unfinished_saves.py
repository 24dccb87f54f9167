"""A checkpoint is whole or absent: saves that fail or are killed on their way."""

import os
import signal
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from checkpointing import files
from checkpointing.files import (
    SUMS_FILE,
    find_checkpoints,
    hash_check,
    partial_dir,
    quick_check,
    read_sums,
    write_common,
    write_part,
)
from checkpointing.housekeeping import remove_partial
from tests import fresh
from tests.checkpointing.saved_checkpoints import Killed, contents, fail, make_tokenizer, save, visible
from tests.tiny import tiny_student

STAGES = {
    "before the weights": (files, "save_file"),
    "before the sums of a part": (files, "sha256"),
    "before the tokenizer": (PreTrainedTokenizerFast, "save_pretrained"),
    "before the state": (Path, "write_text"),
    "before a flush": (files, "flush_to_disk"),
    "before the rename": (Path, "rename"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_save_that_fails_leaves_no_checkpoint(tmp_path, hybrid, tokenizer, monkeypatch, stage):
    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage], fail)
        with pytest.raises(Killed):
            save(tmp_path, hybrid, tokenizer, world_size=2)
        assert visible(tmp_path) == [] == find_checkpoints(tmp_path)
    remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == []
    path = save(tmp_path, hybrid, tokenizer, world_size=2)
    assert AutoModelForCausalLM.from_pretrained(path).config.attention_layers == [1, 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-7"]


def test_all_is_flushed_before_the_rename_and_the_rename_after_it(tmp_path, hybrid, tokenizer, monkeypatch):
    """After a power cut, a checkpoint that has its name must have its content."""
    events = []
    rename = Path.rename
    monkeypatch.setattr(files, "flush_to_disk", lambda path: events.append(path.name))
    monkeypatch.setattr(Path, "rename", lambda own, target: events.append("rename") or rename(own, target))
    path = save(tmp_path, hybrid, tokenizer, world_size=2)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert set(before) > set(contents(path))
    assert before[-2:] == [SUMS_FILE, partial_dir(tmp_path, 7).name]  # the folder's own entries last
    assert after == [tmp_path.name]


def test_what_cannot_be_json_leaves_no_checkpoint(tmp_path, hybrid, tokenizer):
    weights = hybrid.state_dict()
    with pytest.raises(TypeError):
        write_part(partial_dir(tmp_path, 7), 0, 1, weights, {}, position=Path("x"))
    with pytest.raises(TypeError):
        write_common(partial_dir(tmp_path, 7), hybrid, [list(weights)], tokenizer, {"path": Path("x")})
    assert visible(tmp_path) == []


def test_an_existing_checkpoint_is_left_alone(tmp_path, hybrid, tokenizer):
    path = save(tmp_path, hybrid, tokenizer)
    before = contents(path)
    with pytest.raises(FileExistsError, match="checkpoint-7 exists already"):
        save(tmp_path, tiny_student(), tokenizer)
    assert contents(path) == before
    remove_partial(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-7"]


@pytest.mark.parametrize("attempt", [0, 1, 12])
def test_each_try_has_a_folder_of_its_own_that_nobody_sees(tmp_path, attempt):
    partial = partial_dir(tmp_path, 7, attempt)
    partial.mkdir()
    (partial / "model-00001-of-00009.safetensors").write_bytes(b"half a weigh")
    (tmp_path / ".deleted-checkpoint-3").mkdir()
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / ".lock").touch()
    assert visible(tmp_path) == ["checkpoint-5"]
    remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint-5"]
    assert len({partial_dir(tmp_path, 7, n) for n in range(20)}) == 20


def kill_saves(folder):
    """Saves again and again, each time in a process that is killed at its next flush; returns the number of the first
    flush that a whole save does not reach.
    """
    student, tokenizer = tiny_student(), make_tokenizer()
    save(folder, student, tokenizer, 1, world_size=2)
    flush, calls = os.fsync, []
    for n in range(2, 100):
        kill_at = n - 1
        child = os.fork()
        if not child:

            def flush_or_die(descriptor, kill_at=kill_at):
                calls.append(descriptor)
                if len(calls) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                flush(descriptor)

            os.fsync = flush_or_die
            save(folder, student, tokenizer, n, world_size=2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0
            return kill_at


def test_a_process_that_is_killed_while_saving(tmp_path, hybrid, tokenizer):
    """Kills a save at each of its flushes with kill -9."""
    last = fresh.call(kill_saves, tmp_path)
    n_files = len(contents(tmp_path / "checkpoint-1"))
    assert last == n_files + 3 + 1 + 1 + 1  # files, lists of sums, the folder, the rename; and one more
    # A save killed at the last flush has been renamed already; the others left nothing that looks like a checkpoint.
    assert visible(tmp_path) == ["checkpoint-1", f"checkpoint-{last}", f"checkpoint-{last + 1}"]
    for path in find_checkpoints(tmp_path):
        assert quick_check(path) is None and hash_check(path, read_sums(path)) is None
    assert len(list(tmp_path.glob(".partial-checkpoint-*"))) == last - 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1").config.attention_layers == []
    remove_partial(tmp_path)
    save(tmp_path, hybrid, tokenizer, 2)
    assert not list(tmp_path.glob(".partial-checkpoint-*"))
