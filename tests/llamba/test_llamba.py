"""The student's architecture: agreement with the official mixer's golden vectors, packed documents, training,
exact loading, and the round trip of a hybrid.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from llamba import LlambaForCausalLM
from model_utils import apply_replacements
from tests.tiny import tiny_config, tiny_hybrid, tiny_student, tokens

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden vectors are not at {GOLDEN}")
CASES = ["untied", "tied_grouped"]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def hybrid():
    return tiny_hybrid()


# --- the official mixer --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    if not GOLDEN.is_dir():
        pytest.skip(f"golden vectors are not at {GOLDEN}")
    folder = GOLDEN / request.param
    case = json.loads((folder / "case.json").read_text())
    model = LlambaForCausalLM.from_pretrained(folder).eval()
    return folder, case, load_file(folder / "io.safetensors"), model


@torch.no_grad()
def test_golden_logits_and_hidden_states(golden):
    _, _, io, model = golden
    after_block = {}
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out, index=index: after_block.update({index: out}))
        for index, layer in enumerate(model.backbone.layers)
    ]
    logits = model(io["input_ids"]).logits
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(logits, io["student_logits"], **TOLERANCE)
    torch.testing.assert_close(after_block[0], io["hidden_first"], **TOLERANCE)
    torch.testing.assert_close(after_block[len(after_block) - 1], io["hidden_last"], **TOLERANCE)


@torch.no_grad()
def test_golden_states_and_stepwise_decode(golden):
    _, case, io, model = golden
    prefix = case["prefix_len"]
    cache = model(io["input_ids"][:, :prefix], use_cache=True).past_key_values
    for index, layer in enumerate(cache.layers):
        torch.testing.assert_close(layer.conv_state, io[f"state.conv.{index}"], **TOLERANCE)
        torch.testing.assert_close(layer.ssm_state, io[f"state.ssm.{index}"], **TOLERANCE)
    steps = [model(io["input_ids"][:, t : t + 1], past_key_values=cache).logits for t in range(prefix, prefix + 5)]
    torch.testing.assert_close(torch.cat(steps, 1), io["decode_logits"], **TOLERANCE)


@torch.no_grad()
def test_golden_hybrid_logits(golden):
    folder, case, io, _ = golden
    teacher = LlamaForCausalLM.from_pretrained(folder / "teacher").eval()
    model = LlambaForCausalLM.from_pretrained(folder).eval()
    apply_replacements(model, teacher, case["layers"])
    torch.testing.assert_close(teacher(io["input_ids"]).logits, io["teacher_logits"], **TOLERANCE)
    torch.testing.assert_close(model(io["input_ids"]).logits, io["hybrid_logits"], **TOLERANCE)


# --- documents -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_packed_documents_do_not_see_one_another(hybrid):
    ids = tokens(1, 20)
    seq_idx = torch.tensor([[0] * 8 + [1] * 12])
    packed = hybrid(ids, seq_idx=seq_idx, use_cache=False).logits
    apart = torch.cat([hybrid(ids[:, :8]).logits, hybrid(ids[:, 8:]).logits], 1)
    torch.testing.assert_close(packed, apart, **TOLERANCE)
    assert (hybrid(ids).logits[:, 8:] - apart[:, 8:]).abs().max() > 1e-2


# --- training ------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_no_gradient(hybrid):
    hybrid.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            hybrid.gradient_checkpointing_enable({"use_reentrant": False})
            assert all(layer.gradient_checkpointing for layer in hybrid.backbone.layers)
        hybrid.zero_grad()
        hybrid(tokens(), use_cache=False).logits.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in hybrid.named_parameters()})
    hybrid.gradient_checkpointing_disable()
    hybrid.zero_grad()
    hybrid.eval()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


def test_gradients_reach_every_weight_in_bfloat16():
    student = tiny_student().to(torch.bfloat16)
    student(tokens(), use_cache=False).logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in student.parameters())


# --- loading and saving --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_a_hybrid_survives_saving_and_loading(hybrid, tmp_path, max_shard_size):
    hybrid.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is LlambaForCausalLM
    assert loaded.config.attention_layers == [1, 3]
    assert torch.equal(loaded(tokens()).logits, hybrid(tokens()).logits)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llamba"


@torch.no_grad()
@pytest.mark.parametrize("multiple,rows", [(None, 64), (12, 72)])
def test_a_model_with_more_tokens_survives_saving_and_loading(tmp_path, multiple, rows):
    student = tiny_student(lm_head_bias=True)
    student.resize_token_embeddings(61, pad_to_multiple_of=multiple)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.vocab_size == student.get_input_embeddings().num_embeddings == rows
    assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_pytorch_bin_loads_like_safetensors(tmp_path, tied):
    student = tiny_student(tie_embeddings=tied)
    student.config.save_pretrained(tmp_path)
    weights = student.state_dict()
    if tied:
        del weights["lm_head.weight"]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    loaded = LlambaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)
    assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) == tied


@pytest.mark.parametrize(
    "damage,named",
    [
        (lambda w: w.pop("backbone.layers.2.mixer.D"), "backbone.layers.2.mixer.D"),
        (lambda w: w.update({"backbone.layers.2.extra": torch.zeros(2)}), "backbone.layers.2.extra"),
        (lambda w: w.update({"lm_head.weight": torch.zeros(8, 32)}), "lm_head.weight"),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_a_weight_that_does_not_fit_is_named(tmp_path, damage, named):
    student = tiny_student()
    student.config.save_pretrained(tmp_path)
    weights = student.state_dict()
    damage(weights)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        LlambaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=named.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_published_weight_names():
    expected = {"backbone.embedding.weight", "backbone.final_layernorm.weight", "lm_head.weight"}
    for index in range(4):
        layer = f"backbone.layers.{index}"
        mixer = ["in_proj.weight", "conv1d.weight", "conv1d.bias", "z_bias", "D", "out_proj.weight"]
        expected |= {f"{layer}.mixer.{name}" for name in mixer}
        expected |= {f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
        expected |= {f"{layer}.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")}
    assert set(tiny_student().state_dict()) == expected


@needs_golden
def test_a_published_config_is_read_as_it_is(tmp_path):
    shutil.copy(GOLDEN / "tied_grouped" / "config.json", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.vocab_size, config.d_model, config.n_layer) == (120, 64, 4)  # 117 padded to a multiple of 8
    assert config.tie_word_embeddings and config.attention_layers == []
    assert config.ssm_cfg["n_qk_heads"] == 2 and config.ssm_cfg["d_conv"] == 4


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"ssm_cfg": {"n_v_heads": 5}}, "n_v_heads=5"),
        ({"ssm_cfg": {"n_v_heads": 4, "n_qk_heads": 3}}, "n_qk_heads=3"),
        ({"ssm_cfg": {"n_v_heads": 4, "n_qk_heads": 4, "activation": "gelu"}}, "'gelu'"),
        ({"ssm_cfg": {"states": 4}}, "unknown keys \\['states'\\]"),
        ({"attention_layers": [4]}, "\\[4\\] are outside 0..3"),
        ({"attention_layers": [1]}, "without attention_cfg"),
    ],
)
def test_a_config_that_cannot_be_built_says_why(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
