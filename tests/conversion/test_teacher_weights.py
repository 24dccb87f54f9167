"""A Llama read piece by piece: every way that its files may be, one layer in memory, and what is wrong with files."""

import gc
import shutil
import weakref

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file

from conversion.teacher_weights import TeacherWeights
from inputs import model_files
from tests.model_files import change_json, change_weight
from tests.tiny import tiny_student, tiny_teacher, tokens

FLOAT32 = torch.float32


def saved(teacher, folder, kind="safetensors"):
    """Saves a teacher in one file, in shards, as .bin, or under the names of the model without its head."""
    if kind in ("safetensors", "shards"):
        teacher.save_pretrained(folder, max_shard_size="20KB" if kind == "shards" else "5GB")
        return folder
    teacher.config.save_pretrained(folder)
    weights = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    if teacher.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    if kind == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "shards", "bin", "bare"])
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_the_pieces_are_the_whole(tmp_path, kind, tied):
    teacher = tiny_teacher(tie_word_embeddings=tied, attention_bias=True)
    for name, parameter in teacher.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    weights = TeacherWeights(str(saved(teacher, tmp_path, kind)))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (kind == "shards")
    ids = tokens()
    x = weights.embedding(FLOAT32)[ids]
    angles = weights.rotary()(x, torch.arange(ids.shape[1])[None])
    for index in range(weights.config.num_hidden_layers):
        x = weights.layer(index, FLOAT32)(x, position_embeddings=angles)
    logits = weights.norm(FLOAT32)(x) @ weights.head(FLOAT32).T
    assert torch.equal(logits, teacher(ids).logits)


def test_a_layer_is_frozen_and_in_the_dtype_asked_for(tmp_path):
    layer = TeacherWeights(str(saved(tiny_teacher(), tmp_path))).layer(2, torch.bfloat16)
    assert not layer.training
    assert {(p.dtype, p.requires_grad, p.device.type) for p in layer.parameters()} == {(torch.bfloat16, False, "cpu")}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_nothing_that_was_read_stays(tmp_path, kind):
    """The tensors own their memory, and no other of the file is behind them."""
    weights = TeacherWeights(str(saved(tiny_teacher(), tmp_path, kind)))
    layer = weights.layer(0, FLOAT32)
    for parameter in layer.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    gone = [weakref.ref(parameter) for parameter in layer.parameters()]
    del layer, parameter
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)


# --- a name on the Hub -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "shards", "bin"])
def test_only_what_is_read_is_downloaded(tmp_path, monkeypatch, kind):
    """Of a repository that has the weights in two formats and the original ones in a folder."""
    remote, here = saved(tiny_teacher(), tmp_path / "remote", kind), tmp_path / "here"
    wanted = {file.name for file in remote.iterdir()} | {"tokenizer.json"}
    others = ["original/consolidated.00.pth", "original/params.json", "README.md", "model.onnx"]
    others += [] if kind == "bin" else ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    for name in ["tokenizer.json", *others]:
        (remote / name).parent.mkdir(exist_ok=True)
        (remote / name).write_text("{}")

    def download(name, allow_patterns, ignore_patterns):
        assert name == "owner/llama"
        names = [str(file.relative_to(remote)) for file in remote.rglob("*") if file.is_file()]
        here.mkdir(exist_ok=True)
        for found in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (here / found).parent.mkdir(exist_ok=True)
            shutil.copy(remote / found, here / found)
        return str(here)

    monkeypatch.setattr(model_files, "snapshot_download", download)
    assert TeacherWeights("owner/llama").folder == here
    assert {str(file.relative_to(here)) for file in here.rglob("*") if file.is_file()} == wanted


# --- what is wrong with the files ----------------------------------------------------------------------------


def refusal(folder):
    with pytest.raises(ValueError) as error:
        TeacherWeights(str(folder), name="NAME")
    return str(error.value)


def test_a_model_of_another_kind_is_refused(tmp_path):
    tiny_student().save_pretrained(tmp_path)
    known = "expected 'llama', 'mistral', 'qwen2' or 'qwen3'"
    assert refusal(tmp_path) == f"--teacher_model NAME: its config.json says model_type 'llamba'; {known}"


def test_missing_and_misshapen_weights_are_named(tmp_path):
    teacher = tiny_teacher()
    weights = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    del weights["model.layers.2.mlp.up_proj.weight"]
    weights["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(8, 32)
    teacher.config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert refusal(tmp_path) == (
        "--teacher_model NAME: weights that its config.json asks for are missing or misshapen: "
        "model.layers.1.self_attn.k_proj.weight (8x32, expected 16x32), model.layers.2.mlp.up_proj.weight; copy the "
        "model again"
    )


@pytest.mark.parametrize("changed,more", [("num_hidden_layers", 3), ("attention_bias", False)])
def test_weights_without_a_place_are_named(tmp_path, changed, more):
    saved(tiny_teacher(attention_bias=True), tmp_path)
    change_json(tmp_path / "config.json", **{changed: more})
    assert "its config.json has no place for weights that its files have: model.layers." in refusal(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_named_when_it_is_read(tmp_path, value):
    name = "model.layers.1.mlp.up_proj.weight"
    saved(tiny_teacher(), tmp_path)
    change_weight(tmp_path, name, lambda weight: weight.index_fill(0, torch.tensor(3), value))
    weights = TeacherWeights(str(tmp_path), name="NAME")
    weights.layer(0, FLOAT32)
    with pytest.raises(ValueError, match=f"--teacher_model NAME: {name} holds -?(nan|inf) in float32, expected numb"):
        weights.layer(1, FLOAT32)


def test_files_that_are_cut_short_are_one_line(tmp_path):
    saved(tiny_teacher(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "\n" not in refusal(tmp_path)


def test_a_config_that_is_too_wide_for_its_weights(tmp_path):
    saved(tiny_teacher(), tmp_path)
    change_json(tmp_path / "config.json", num_key_value_heads=4)
    assert "model.layers.0.self_attn.k_proj.weight (16x32, expected 32x32)" in refusal(tmp_path)
