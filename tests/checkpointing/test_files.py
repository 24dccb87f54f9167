"""What a checkpoint holds, its round trip, its size and its permissions."""

import json
import os
import re
import stat
import subprocess

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpointing.files import (
    STATE_FILE,
    SUMS_FILE,
    checkpoint_bytes,
    checkpoint_dir,
    data_file,
    deal_weights,
    hash_check,
    largest_file,
    model_file,
    open_optimizer,
    optimizer_file,
    quick_check,
    read_position,
    read_state,
    read_sums,
    try_writing,
)
from llamba import LlambaForCausalLM
from model_utils import freeze_student_mlps, locate_model
from tests.checkpointing.saved_checkpoints import STATE, contents, save, shard_of
from tests.tiny import tiny_hybrid, tokens

# --- content -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_checkpoint_holds_what_a_run_needs(tmp_path, hybrid, tokenizer, world_size):
    path = save(tmp_path, hybrid, tokenizer, world_size=world_size)
    assert path == tmp_path / "checkpoint-7" == checkpoint_dir(tmp_path, 7)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-7"]
    parts = [name(rank, world_size) for rank in range(world_size) for name in (model_file, optimizer_file, data_file)]
    common = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", STATE_FILE, SUMS_FILE}
    index = {"model.safetensors.index.json"} if world_size > 1 else set()
    assert contents(path).keys() >= {*parts, *common, *index}
    assert not any(name.startswith(".") for name in contents(path))
    assert read_state(path) == {**STATE, "world_size": world_size}
    assert [read_position(path, rank, world_size) for rank in range(world_size)] == [
        {"windows": 70, "of": rank} for rank in range(world_size)
    ]
    assert STATE_FILE == "training_state.json"
    assert locate_model("--student_model", str(path), local_files_only=True) == str(path)
    assert quick_check(path) is None and hash_check(path, read_sums(path)) is None


@pytest.mark.parametrize("world_size", [1, 3])
def test_sha256sum_reads_the_sums(tmp_path, hybrid, tokenizer, world_size):
    path = save(tmp_path, hybrid, tokenizer, world_size=world_size)
    result = subprocess.run(["sha256sum", "--strict", "-c", SUMS_FILE], cwd=path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    listed = re.findall(r"^(.*): OK$", result.stdout, flags=re.MULTILINE)
    assert sorted(listed) == sorted(contents(path).keys() - {SUMS_FILE})  # every file, and each once


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, tokenizer, dtype, world_size, tied):
    student = tiny_hybrid(dtype, tie_embeddings=tied)
    path = save(tmp_path, student, tokenizer, world_size=world_size)
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    assert isinstance(loaded, LlambaForCausalLM)
    assert loaded.config.attention_layers == [1, 3]
    assert loaded.config.attention_cfg == student.config.attention_cfg
    assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) is tied
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


def test_the_index_is_true(tmp_path, tokenizer):
    student = tiny_hybrid(tie_embeddings=True)
    path = save(tmp_path, student, tokenizer, world_size=3)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    found = {}
    for rank in range(3):
        with safe_open(path / model_file(rank, 3), "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: (model_file(rank, 3), file.get_tensor(name).nbytes) for name in file.keys()}  # noqa: SIM118
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert index["metadata"]["total_size"] == sum(size for _, size in found.values())


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_is_dealt_once_and_shares_are_even(world_size, tied):
    weights = tiny_hybrid(tie_embeddings=tied).state_dict()
    shares = deal_weights(weights, world_size)
    dealt = [name for share in shares for name in share]
    assert len(shares) == world_size and len(dealt) == len(set(dealt))
    assert weights.keys() - set(dealt) == ({"lm_head.weight"} if tied else set())
    loads = [sum(weights[name].nbytes for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(tensor.nbytes for tensor in weights.values())
    assert shares == deal_weights(dict(weights), world_size)  # every rank deals alike


def test_a_shard_is_found_by_names_whoever_wrote_it(tmp_path, hybrid, tokenizer):
    path = save(tmp_path, hybrid, tokenizer, world_size=3)
    opened = open_optimizer(path, 3)
    shares = deal_weights(hybrid.state_dict(), 3)
    expected = {}
    for rank in range(3):
        expected |= shard_of(hybrid, shares[rank], rank)
        assert load_file(path / optimizer_file(rank, 3)).keys() == shard_of(hybrid, shares[rank], rank).keys()
    assert opened.keys() == expected.keys() and len(expected) == len(list(hybrid.parameters()))
    assert all(torch.equal(opened[name].get_tensor(name), value) for name, value in expected.items())


def test_saving_leaves_the_student_as_it_was(tmp_path, hybrid, tokenizer):
    before = {name: value.clone() for name, value in hybrid.state_dict().items()}
    save(tmp_path, hybrid, tokenizer, world_size=2)
    assert all(torch.equal(before[name], value) for name, value in hybrid.state_dict().items())
    assert not hybrid.training


def test_the_size_of_a_checkpoint_is_known_beforehand(tmp_path, tokenizer):
    """The size follows from the shapes: all weights, and two or three float32 values per trained weight."""
    for dtype, kinds in ((torch.float32, 2), (torch.bfloat16, 3)):
        student = tiny_hybrid(dtype)
        freeze_student_mlps(student)
        trained = [p.numel() for p in student.parameters() if p.requires_grad]
        weights = sum(p.nbytes for p in student.parameters())
        assert checkpoint_bytes(student) == weights + 4 * kinds * sum(trained)
        sizes = [4 * kinds * max(trained), 4 * kinds * sum(trained) // 3, weights // 3]
        assert largest_file(student, 3) == max(sizes) and largest_file(student, 1) >= weights
        assert 0 < len(trained) < len(list(student.parameters()))


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_all_files_have_the_permissions_that_the_umask_says(tmp_path, hybrid, tokenizer, umask):
    """safetensors alone makes files that only their owner can read."""
    before = os.umask(umask)
    try:
        path = save(tmp_path, hybrid, tokenizer, world_size=2)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o666 & ~umask}
    assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask


def test_a_trial_leaves_nothing(tmp_path):
    try_writing(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such file"):
        try_writing(tmp_path / "absent")
