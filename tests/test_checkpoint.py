"""Checkpoints are whole or absent: what a directory holds, its round trip, and saves that end on their way."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import checkpoint
from checkpoint import STATE_FILE, save_checkpoint
from llamba import LlambaForCausalLM
from model_utils import apply_replacements, locate_model
from tests.tiny import tiny_student, tiny_teacher, tokens
from utils import prepare_output_dir

ROOT = Path(__file__).parents[1]
STATE = {"micro_step": 7, "step": 3, "arguments": {"layers": [1, 3], "log_file": None, "max_lr": 1e-5}}


class Killed(Exception):
    """Stands for whatever ends a save on its way."""


def make_tokenizer():
    words = {word: index for index, word in enumerate(["<unk>", "<eos>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


@pytest.fixture(scope="module")
def hybrid():
    student = tiny_student()
    apply_replacements(student, tiny_teacher(), [1, 3])
    return student


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def visible(folder):
    """What a user, a glob, and the check of the next run take for checkpoints."""
    return sorted(path.name for path in folder.glob("checkpoint-*"))


# --- content -------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_a_run_needs(tmp_path, hybrid, tokenizer):
    path = save_checkpoint(tmp_path, 7, hybrid, tokenizer, STATE)
    assert path == tmp_path / "checkpoint-7"
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-7"]
    assert contents(path).keys() >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads((path / STATE_FILE).read_text()) == STATE
    assert STATE_FILE == "training_state.json"
    assert locate_model("--student_model", str(path), local_files_only=True) == str(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, tokenizer, dtype):
    student = tiny_student()
    apply_replacements(student, tiny_teacher(), [1, 3])
    student = student.to(dtype)
    path = save_checkpoint(tmp_path, 0, student, tokenizer, STATE)
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    assert isinstance(loaded, LlambaForCausalLM)
    assert loaded.config.attention_layers == [1, 3]
    assert loaded.config.attention_cfg == student.config.attention_cfg
    saved, found = student.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys()
    for name in saved:
        assert found[name].dtype == dtype
        assert torch.equal(saved[name], found[name]), name
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)
    reloaded = AutoTokenizer.from_pretrained(path)
    assert reloaded("a b hh h").input_ids == tokenizer("a b hh h").input_ids == [2, 3, 0, 9]
    assert reloaded.eos_token == "<eos>"


def test_saving_leaves_the_student_as_it_was(tmp_path, hybrid, tokenizer):
    before = {name: value.clone() for name, value in hybrid.state_dict().items()}
    save_checkpoint(tmp_path, 1, hybrid, tokenizer, STATE)
    assert all(torch.equal(before[name], value) for name, value in hybrid.state_dict().items())
    assert not hybrid.training


# --- saves that do not come to their end ---------------------------------------------------------------------


def fail(*args, **kwargs):
    raise Killed


STAGES = {
    "before the weights": (LlambaForCausalLM, "save_pretrained"),
    "before the tokenizer": (PreTrainedTokenizerFast, "save_pretrained"),
    "before the state": (Path, "write_text"),
    "before the flush": (checkpoint, "flush_to_disk"),
    "before the rename": (Path, "rename"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_save_that_fails_leaves_no_checkpoint(tmp_path, hybrid, tokenizer, monkeypatch, stage):
    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage], fail)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, 7, hybrid, tokenizer, STATE)
        assert visible(tmp_path) == []
    assert prepare_output_dir(str(tmp_path), resume_step=0) == tmp_path
    path = save_checkpoint(tmp_path, 7, hybrid, tokenizer, STATE)
    assert AutoModelForCausalLM.from_pretrained(path).config.attention_layers == [1, 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-7"]


def test_all_is_flushed_before_the_rename_and_the_rename_after_it(tmp_path, hybrid, tokenizer, monkeypatch):
    """A machine that loses power must not find the name without the content."""
    events = []
    rename = Path.rename
    monkeypatch.setattr(checkpoint, "flush_to_disk", lambda path: events.append(path.name))
    monkeypatch.setattr(Path, "rename", lambda own, target: events.append("rename") or rename(own, target))
    path = save_checkpoint(tmp_path, 7, hybrid, tokenizer, STATE)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert set(before) > set(contents(path))
    assert after == [tmp_path.name]


def test_what_a_killed_run_left_does_not_get_into_the_next_save(tmp_path, hybrid, tokenizer):
    partial = tmp_path / ".partial-checkpoint-7"
    partial.mkdir()
    (partial / "model-00001-of-00009.safetensors").write_bytes(b"half a weigh")
    assert visible(tmp_path) == []
    path = save_checkpoint(tmp_path, 7, hybrid, tokenizer, STATE)
    assert "model-00001-of-00009.safetensors" not in contents(path)
    assert not partial.exists()


def test_a_state_that_is_no_json_leaves_no_checkpoint(tmp_path, hybrid, tokenizer):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 7, hybrid, tokenizer, {"path": Path("x")})
    assert visible(tmp_path) == []


def test_an_existing_checkpoint_is_left_alone(tmp_path, hybrid, tokenizer):
    path = save_checkpoint(tmp_path, 7, hybrid, tokenizer, STATE)
    before = contents(path)
    other = tiny_student()
    with pytest.raises(FileExistsError, match="checkpoint-7 exists already"):
        save_checkpoint(tmp_path, 7, other, tokenizer, {"micro_step": 8})
    assert contents(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-7"]


KILLED_SAVE = """
import os, signal, sys
from pathlib import Path
import checkpoint
from tests.test_checkpoint import STATE, make_tokenizer
from tests.tiny import tiny_student

folder, kill_at = Path(sys.argv[1]), int(sys.argv[2])
checkpoint.save_checkpoint(folder, 1, tiny_student(), make_tokenizer(), STATE)
flush, calls = os.fsync, []

def flush_or_die(descriptor):
    calls.append(descriptor)
    if len(calls) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    flush(descriptor)

os.fsync = flush_or_die
checkpoint.save_checkpoint(folder, 2, tiny_student(), make_tokenizer(), STATE)
"""


def test_a_process_that_is_killed_while_saving(tmp_path, hybrid, tokenizer):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED_SAVE, str(tmp_path), "2"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert visible(tmp_path) == ["checkpoint-1"]
    assert (tmp_path / ".partial-checkpoint-2").is_dir()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1").config.attention_layers == []
    save_checkpoint(tmp_path, 2, hybrid, tokenizer, STATE)
    assert visible(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert not (tmp_path / ".partial-checkpoint-2").exists()
