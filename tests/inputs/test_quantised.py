"""Quantised models are refused in one line that says what is supported: by their config, or integers in their files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from inputs.loaded_models import check_weights
from inputs.model_files import read_config
from llamba.quantised import quantised_weight
from model_utils import get_student_model, read_llamba_config
from tests.model_files import cache_of_the_hub, change_json, change_weight
from tests.tiny import tiny_student, tiny_teacher

SUPPORTED = "supported are float32, bfloat16 and float16 weights"
WEIGHT = {"teacher": "model.layers.1.self_attn.q_proj.weight", "student": "backbone.layers.1.mixer.D"}
READ = {"teacher": read_config, "student": read_llamba_config}


@pytest.fixture(params=["teacher", "student"])
def role(request):
    return request.param


@pytest.fixture
def folder(tmp_path, role):
    make = {"teacher": tiny_teacher, "student": tiny_student}[role]
    make().save_pretrained(tmp_path / role)
    return tmp_path / role


def error_of(role, folder):
    """Returns the error of reading the config, which run, plan, doctor and evaluation begin with."""
    with pytest.raises(ValueError) as error:
        READ[role](f"--{role}_model", "NAME", str(folder))
    message = str(error.value)
    assert message.startswith(f"--{role}_model NAME: ") and SUPPORTED in message and "\n" not in message
    return message


@pytest.mark.parametrize(
    "values,method",
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
        ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, "fp8"),
        ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "fbgemm_fp8"),
        ({"quantization_config": "gptq"}, "gptq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ],
    ids=str,
)
def test_a_config_that_says_so(role, folder, values, method):
    change_json(folder / "config.json", **values)
    assert f"quantised, by {method} as" in error_of(role, folder)


def test_a_config_that_says_no(role, folder):
    change_json(folder / "config.json", quantization_config=None, compression_config={})
    assert READ[role]("--flag", "NAME", str(folder)).num_hidden_layers


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_stray_integer_tensor_is_named(role, folder, dtype):
    change_weight(folder, WEIGHT[role], lambda weight: weight.to(dtype))
    message = error_of(role, folder)
    assert f"{WEIGHT[role]} in model.safetensors is {str(dtype).removeprefix('torch.')[:11]}" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floats_are_read(role, folder, dtype):
    change_weight(folder, WEIGHT[role], lambda weight: weight.to(dtype))
    assert READ[role]("--flag", "NAME", str(folder)).num_hidden_layers


def test_shards_and_bin_files_are_looked_into(role, folder):
    weights = load_file(folder / "model.safetensors")
    name = WEIGHT[role]
    weights[name] = weights[name].to(torch.int8)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert f"{name} in pytorch_model.bin is int8" in error_of(role, folder)

    shards = {"model-1.safetensors": {name: weights.pop(name)}, "model-2.safetensors": weights}
    for shard, part in shards.items():
        save_file(part, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: shard for shard, part in shards.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"{name} in model-1.safetensors is int8" in error_of(role, folder)
    (folder / "model-1.safetensors").unlink()  # a plan reads what there is
    READ[role]("--flag", "NAME", str(folder))


def test_integers_that_are_no_weights_are_left_alone(tmp_path):
    """As the masks in the files of older GPT-2s."""
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    weights["num_batches_tracked"] = torch.ones((), dtype=torch.int64)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert read_config("--teacher_model", "NAME", str(tmp_path)).model_type == "gpt2"


@pytest.mark.parametrize(
    "stored,expected",
    [
        ({"h.0.mlp.weight": "int8"}, "h.0.mlp.weight"),  # stored without the model's prefix
        ({"more.transformer.h.0.mlp.weight": "int8"}, "more.transformer.h.0.mlp.weight"),
        ({"transformer.h.0.mlp.qweight": "int32"}, "transformer.h.0.mlp.qweight"),
        ({"scale": "float8_e8m0"}, "scale"),
        ({"h.0.D": "int8"}, "h.0.D"),
        ({"h.0.attn.bias": "bool", "position_ids": "int64"}, None),
        ({"h.0.mlp.weight": "bfloat16"}, None),
    ],
)
def test_which_tensors_are_weights(stored, expected):
    parameters = ["transformer.h.0.mlp.weight", "transformer.h.0.D", "transformer.h.0.attn.out.bias"]
    assert quantised_weight(stored, parameters) == expected


def test_a_name_of_the_hub_is_looked_into_once_it_has_been_loaded(role, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = cache_of_the_hub(tmp_path / "hub", "someone/model", folder)
    model = {"teacher": tiny_teacher, "student": tiny_student}[role]()
    check_weights("--flag", "someone/model", model)
    change_weight(cached, WEIGHT[role], lambda weight: weight.to(torch.int8))
    with pytest.raises(ValueError, match="--flag someone/model: .* is int8"):
        check_weights("--flag", "someone/model", model)


def test_a_student_whose_files_lack_a_weight_is_one_line(tmp_path):
    tiny_student().save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", n_layer=5)
    with pytest.raises(ValueError) as error:
        get_student_model(str(tmp_path), torch.float32, torch.device("cpu"), "--ckpt")
    message = str(error.value)
    assert message.startswith(f"--ckpt {tmp_path}: ") and "backbone.layers.4" in message and "\n" not in message
