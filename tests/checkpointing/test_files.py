"""What a checkpoint holds, its round trip, and a folder of checkpoints: the newest, those kept, the bad ones."""

import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpointing import files
from checkpointing.files import (
    STATE_FILE,
    SUMS_FILE,
    checkpoint_bytes,
    checkpoint_dir,
    data_file,
    deal_weights,
    find_checkpoints,
    hash_check,
    keep_newest,
    model_file,
    open_optimizer,
    optimizer_file,
    point_latest_to,
    quick_check,
    read_position,
    read_state,
    read_sums,
    remove_partial,
    set_bad_aside,
)
from llamba import LlambaForCausalLM
from model_utils import freeze_student_mlps, locate_model
from tests.checkpointing.saved_checkpoints import STATE, Killed, contents, fail, save, shard_of, visible
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
        assert 0 < len(trained) < len(list(student.parameters()))


# --- the folder of checkpoints -------------------------------------------------------------------------------


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
    return [files.step_of(path) for path in find_checkpoints(folder)]


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


def test_a_latest_that_somebody_made_a_folder_stays(numbered):
    (numbered / "latest").mkdir()
    (numbered / "latest" / "mine").touch()
    with pytest.raises(OSError):
        point_latest_to(numbered / "checkpoint-5")
    assert (numbered / "latest" / "mine").exists()
