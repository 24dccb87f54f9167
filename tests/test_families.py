"""Teachers beyond Llama: a student is made of each, trained with whole layers of it, saved, and exported; layers keep
what they compute; what has another form is refused by name.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Glm4Config, Qwen2Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

import make_student
from conversion.closed_form import copy_projections, fit_mixer
from conversion.heads import constant_norms, plain_heads
from conversion.options import parse_make_args
from conversion.student_config import problems_of_teacher
from conversion.teacher_stream import TeacherStream
from conversion.teacher_weights import TeacherWeights
from distillation import teacher_forward
from distillation.pairing import check_alignment
from distillation.teacher_forward import Teacher
from llamba import LlambaConfig, LlambaForCausalLM, attention_cfg_from
from llamba.export import main as export
from llamba.families import FAMILIES, other_form
from llamba.llama import FrozenMLP, RMSNorm, use_kernels
from model_utils import apply_replacements, check_replacements
from tests import fresh
from tests.conversion.mixers import mixer_for, relative
from tests.conversion.pairs import freeze_all_but_mixers, student_of
from tests.small_runs import TEXT, TOKENIZER, options, read_metrics
from tests.tiny import tiny_config, tiny_family, tokens

OTHERS = ["mistral", "qwen2", "qwen3"]
SHORT = ["--calibration_tokens", "512", "--held_out_tokens", "64", "--seq_length", "64", "--dtype", "float32"]


def layer_output(model, index, x):
    """Returns what layer `index` of a causal model, of transformers or ours, gives for hidden states x (B, S, D)."""
    backbone = model.base_model
    angles = backbone.rotary_emb(x, torch.arange(x.shape[1])[None])
    return backbone.layers[index](x, position_embeddings=angles, attention_mask=None)


def parts_kept(model, teacher, layers):
    x = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
    for index in layers:
        torch.testing.assert_close(layer_output(model, index, x), layer_output(teacher, index, x), rtol=1e-6, atol=1e-6)


# --- from end to end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_from_a_teacher_to_an_export(tmp_path, no_torchrun, kind):
    teacher = tiny_family(kind)
    teacher.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "teacher")
    given = ["--teacher_model", str(tmp_path / "teacher"), "--output", str(tmp_path / "student")]
    make_student.main(parse_make_args([*given, "--calibration", str(TEXT), "--layers", "1", "3", *SHORT]))
    measured = json.loads((tmp_path / "student" / "conversion.json").read_text())["held_out"]
    assert measured["all_recurrent"]["kl"] < measured["no_mixers"]["kl"]

    short = dict(max_steps=2, max_lr=1e-3, save_interval=None, freeze_replaced_layers=True)
    codes, log = fresh.ranks(options(tmp_path, tmp_path / "run", **short), 2)
    assert codes == [0, 0], log[-4000:]
    assert len(read_metrics(tmp_path / "run")) >= 2

    trained = LlambaForCausalLM.from_pretrained(tmp_path / "run" / "latest").eval()
    assert trained.config.attention_cfg["model_type"] == kind
    parts_kept(trained, teacher, [1, 3])

    assert export([str(tmp_path / "run" / "latest"), str(tmp_path / "exported")]) == 0
    assert f"2 are a {FAMILIES[kind].title}'s attention layers" in (tmp_path / "exported" / "README.md").read_text()
    logits = torch.from_numpy(fresh.call(logits_elsewhere, tmp_path / "exported"))
    torch.testing.assert_close(logits, trained(tokens()).logits, rtol=1e-5, atol=1e-5)


def logits_elsewhere(folder: Path):
    """Returns the logits of an export, loaded by the code beside it and not by this package."""
    torch.set_num_threads(1)
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(LlambaConfig)
    CONFIG_MAPPING._extra_content.pop("llamba")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert not isinstance(model, LlambaForCausalLM)
    with torch.no_grad():
        return model(tokens()).logits.numpy()  # a tensor would be shared with a process that has ended


# --- layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_with_all_layers_a_student_is_the_teacher(tmp_path, kind):
    teacher = tiny_family(kind)
    student = student_of(teacher)
    student.lm_head.load_state_dict(teacher.lm_head.state_dict())
    apply_replacements(student, teacher, [0, 1, 2, 3])
    student.eval().save_pretrained(tmp_path)
    again = LlambaForCausalLM.from_pretrained(tmp_path)
    ids = tokens()
    for model in (student, again):
        torch.testing.assert_close(model(ids).logits, teacher(ids).logits, rtol=1e-5, atol=1e-5)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = teacher.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(again.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_its_ways_through_a_teacher_agree(tmp_path, monkeypatch, kind):
    """Layer by layer here, as transformers runs it, and from files beside a student."""
    teacher = tiny_family(kind)
    teacher.config.save_pretrained(tmp_path)
    teacher.save_pretrained(tmp_path)
    ids = tokens()
    expected = teacher.base_model(ids).last_hidden_state
    with monkeypatch.context() as patched:
        patched.setattr(type(teacher.base_model), "forward", None)
        assert torch.equal(teacher_forward.last_hidden_states(teacher, ids), expected)
    stream = TeacherStream(TeacherWeights(str(tmp_path)), freeze_all_but_mixers(student_of(teacher)), vocab=50)
    torch.testing.assert_close(stream(ids), expected, rtol=1e-5, atol=1e-5)
    assert len(Teacher(teacher, "hidden", 50).hidden_states(ids)) == 5


def test_a_teacher_with_windows_is_run_by_transformers():
    windowed = tiny_family("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2)
    assert not teacher_forward.runs_by_layers(windowed)
    assert teacher_forward.runs_by_layers(tiny_family("qwen2"))


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_kernels_take_norms_and_mlps_but_for_the_norms_of_heads(kind):
    model = tiny_family(kind)
    expected = model(tokens()).logits
    use_kernels(model, FrozenMLP)
    kinds = {name: type(module) for name, module in model.named_modules() if "norm" in name.rpartition(".")[2]}
    of_heads = {name for name in kinds if name.endswith(("q_norm", "k_norm"))}
    assert len(of_heads) == 8 * FAMILIES[kind].normed_heads
    assert {name for name, kind in kinds.items() if kind is RMSNorm} == kinds.keys() - of_heads
    assert all(type(layer.mlp) is FrozenMLP for layer in model.model.layers)
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_kept_heads_are_those_of_the_attention(tmp_path, kind):
    """Against the whole attention with the columns of all other heads at zero."""
    teacher = tiny_family(kind)
    student = student_of(teacher)
    apply_replacements(student, teacher, [], {2: [0, 2, 3]})
    student.save_pretrained(tmp_path)
    layer = LlambaForCausalLM.from_pretrained(tmp_path).backbone.layers[2]
    whole = teacher.model.layers[2].self_attn
    u, angles = torch.randn(2, 24, 32), teacher.model.rotary_emb(torch.zeros(()), torch.arange(24)[None])
    whole.o_proj.weight[:, whole.head_dim : 2 * whole.head_dim] = 0
    expected = whole(u, position_embeddings=angles, attention_mask=None)[0]
    torch.testing.assert_close(layer.attention(u, position_embeddings=angles), expected, rtol=1e-6, atol=1e-6)


def test_hybrids_of_before_there_were_families_are_llamas():
    settings = attention_cfg_from(tiny_family("llama").config)
    del settings["model_type"]
    config = LlambaConfig(**tiny_config().to_dict() | {"attention_layers": [1], "attention_cfg": settings})
    assert config.attention_config().model_type == "llama"


# --- the closed form -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_factor_for_a_norm_is_the_one_of_least_squares():
    attention = tiny_family("qwen3").model.layers[0].self_attn
    u = torch.randn(3, 40, 32)
    found = constant_norms(attention, u)
    q = attention.q_proj(u).unflatten(-1, (4, 16))  # (B, S, H, P)
    k = attention.k_proj(u).unflatten(-1, (2, 16)).repeat_interleave(2, dim=2)
    for z, factors in ((q, found[0]), (k, found[1])):
        normed = z / z.square().mean(-1, keepdim=True).sqrt()
        for head in range(4):
            expected = torch.linalg.lstsq(z[:, :, head].reshape(-1, 1), normed[:, :, head].reshape(-1, 1)).solution
            assert factors[head].item() == pytest.approx(expected.item(), rel=1e-4)
    assert constant_norms(tiny_family("qwen2").model.layers[0].self_attn, u) is None


def traces_of(teacher):
    """Returns an attention, and its inputs and outputs (B, S, D)."""
    attention, u = teacher.model.layers[1].self_attn, torch.randn(24, 32, 32) + 0.5
    angles = teacher.model.rotary_emb(u, torch.arange(32)[None])
    return attention, u, attention(u, position_embeddings=angles, attention_mask=None)[0]


@pytest.mark.parametrize("kind", OTHERS)
@torch.no_grad()
def test_the_closed_form_comes_closer_than_projections(kind):
    attention, u, a = traces_of(tiny_family(kind))
    fitted, copied = mixer_for(attention), mixer_for(attention)
    fit_mixer(fitted, attention, u, u, a)
    copy_projections(copied, attention, plain_heads(4)._replace(norms=constant_norms(attention, u)))
    assert relative(fitted, u, a) < min(0.75, relative(copied, u, a))


@torch.no_grad()
def test_factors_for_norms_come_closer_than_none(monkeypatch):
    attention, u, a = traces_of(tiny_family("qwen3", initializer_range=0.4))
    fitted, fitted_without, copied, copied_without = (mixer_for(attention) for _ in range(4))
    fit_mixer(fitted, attention, u, u, a)
    copy_projections(copied, attention, plain_heads(4)._replace(norms=constant_norms(attention, u)))
    copy_projections(copied_without, attention, plain_heads(4))
    monkeypatch.setattr("conversion.closed_form.constant_norms", lambda *_: None)
    fit_mixer(fitted_without, attention, u, u, a)
    assert relative(fitted, u, a) < relative(fitted_without, u, a)
    assert relative(copied, u, a) < 0.8 * relative(copied_without, u, a)


# --- refusals ------------------------------------------------------------------------------------------------


WINDOWS = dict(num_hidden_layers=4, hidden_size=32, use_sliding_window=True, sliding_window=8, max_window_layers=2)
REFUSED = [
    (FAMILIES["mistral"].config(hidden_size=32, num_hidden_layers=4), "sliding_window 4096"),
    (Qwen2Config(**WINDOWS), "layer_types with 'sliding_attention'"),
    (FAMILIES["qwen3"].config(**WINDOWS), "layer_types with 'sliding_attention'"),
    (Glm4Config(hidden_size=32, num_hidden_layers=4), "model_type 'glm4'; expected 'llama', 'mistral', 'qwen2'"),
    (Gemma2Config(hidden_size=32, num_hidden_layers=4), "model_type 'gemma2'"),
]


@pytest.mark.parametrize("config,words", REFUSED, ids=lambda value: getattr(value, "model_type", ""))
def test_another_form_is_refused_by_name(config, words):
    assert words in other_form(config)
    for refused in (
        lambda: check_replacements(tiny_config(), config, [1]),
        lambda: check_alignment(None, tiny_config(), config),
    ):
        with pytest.raises(ValueError) as raised:
            refused()
        assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("config,words", REFUSED, ids=lambda value: getattr(value, "model_type", ""))
def test_no_student_is_made_of_another_form(tmp_path, config, words):
    config.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError) as raised:
        make_student.main(
            parse_make_args(
                ["--teacher_model", str(tmp_path / "teacher"), "--output", str(tmp_path / "made"), *SHORT]
                + ["--calibration", str(TEXT)]
            )
        )
    assert words in str(raised.value) and str(raised.value).startswith("--teacher_model ")


def test_windows_that_no_layer_uses_are_none():
    """As the published configs of Qwen2 have them."""
    config = Qwen2Config(use_sliding_window=False, sliding_window=32768, max_window_layers=28)
    assert other_form(config) is None


@pytest.mark.parametrize("kind", ["gemma2", 3, None, ["llama"]])
def test_an_unknown_family_in_a_hybrids_config_is_one_line(kind):
    settings = attention_cfg_from(tiny_family("llama").config) | {"model_type": kind}
    with pytest.raises(ValueError, match="attention_cfg.model_type=.*expected 'llama', 'mistral'"):
        tiny_config(attention_layers=[1], attention_cfg=settings)
    settings = attention_cfg_from(tiny_family("qwen2").config) | {"mlp_bias": True}
    with pytest.raises(ValueError, match="attention_cfg has unknown keys .'mlp_bias'."):
        tiny_config(attention_layers=[1], attention_cfg=settings)


def test_a_qwen2_needs_no_biases_of_the_mixers():
    """Its biases have a place without those of the mixers: it has none at o_proj."""
    assert problems_of_teacher({"model_type": "qwen2", "attention_bias": True}, ssm_bias=False) == []
    assert "attention_bias" in problems_of_teacher({"model_type": "qwen3", "attention_bias": True}, ssm_bias=False)[0]
