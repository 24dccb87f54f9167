"""Layers that keep some of the teacher's heads: equal to the whole attention and the whole mixer with the other heads
blanked out, alone, padded and in packed documents; all heads are the teacher's layer; and the cache's bytes.
"""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import eager_attention_forward

from llamba import LlambaBlock, LlambaCache, LlambaConfig, SharedPrefix, cache_bytes, can_share
from llamba.kept_heads import KeptHeads
from model_utils import apply_replacements, check_replacements
from tests.tiny import tiny_config, tiny_student, tiny_teacher, tokens

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
HEADS = {0: [1], 1: [0, 2, 3], 3: [2, 3]}  # of layer 1 two share a key/value head, and one has its own


def strong_teacher(**changes):
    """Returns a teacher whose attention depends on positions, which initial weights hardly do."""
    teacher = tiny_teacher(**changes)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return teacher


def hybrid(heads=HEADS, layers=(), teacher=None, **changes):
    student = tiny_student(**changes)
    apply_replacements(student, teacher or strong_teacher(), list(layers), heads)
    return student.eval()


class WholeAttention(nn.Module):
    """Is a teacher's attention with the call of `KeptHeads`."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, u, cache, **inputs):
        assert cache is None
        return self.attention(u, **inputs)[0]


@torch.no_grad()
def blanked(made, student, teacher, heads):
    """Returns a copy of a hybrid that has, in layers with heads, the student's whole mixer and the teacher's whole
    attention, whose output projections read nothing from the heads that are not theirs.
    """
    reference = copy.deepcopy(made)
    for index, kept in heads.items():
        block = reference.backbone.layers[index]
        with_bias = block.attention.o_proj.bias is not None
        block.mixer = copy.deepcopy(student.backbone.layers[index].mixer)
        block.mixer.out_proj.weight.unflatten(1, (4, -1))[:, kept] = 0.0
        attention = copy.deepcopy(teacher.model.layers[index].self_attn)
        others = [head for head in range(4) if head not in kept]
        attention.o_proj.weight.unflatten(1, (4, -1))[:, others] = 0.0
        if attention.o_proj.bias is not None and not with_bias:
            attention.o_proj.bias.zero_()
        block.attention = WholeAttention(attention)
    return reference


CASES = {
    "grouped heads": ({}, {}),
    "as many groups as heads": ({"num_key_value_heads": 4}, {}),
    "one key/value head": ({"num_key_value_heads": 1}, {}),
    "biases of the teacher": ({"attention_bias": True, "mlp_bias": True}, {}),
    "biases of both": ({"attention_bias": True}, {"ssm_cfg": dict(d_state=8, n_v_heads=4, n_qk_heads=4, bias=True)}),
    "wide heads": ({"head_dim": 16}, {"ssm_cfg": dict(d_state=8, n_v_heads=4, n_qk_heads=1, expand=2)}),
}


@torch.no_grad()
@pytest.mark.parametrize("of_teacher,of_student", CASES.values(), ids=CASES)
def test_kept_heads_and_the_others_equal_the_whole_with_the_rest_blanked(of_teacher, of_student):
    teacher, student = strong_teacher(**of_teacher), tiny_student(**of_student)
    made = hybrid(teacher=teacher, **of_student)
    reference = blanked(made, student, teacher, HEADS)
    ids, mask = tokens(2, 21), torch.ones(2, 21, dtype=torch.long)
    mask[0, :6] = 0
    for inputs in ({}, {"attention_mask": mask}, {"seq_idx": torch.tensor([[0] * 8 + [1] * 13] * 2)}):
        expected = reference(ids, use_cache=False, **inputs).logits
        found = made(ids, use_cache=False, **inputs).logits
        shown = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        torch.testing.assert_close(found[shown], expected[shown], **TOLERANCE)
    assert made(ids).logits.sub(student(ids).logits).abs().max() > 0.1


@torch.no_grad()
def test_a_module_of_all_heads_is_the_teachers_attention():
    teacher = strong_teacher(attention_bias=True)
    whole = teacher.model.layers[1].self_attn
    heads = KeptHeads(whole, [0, 1, 2, 3])
    heads.load_state_dict(whole.state_dict())
    u = torch.randn(2, 9, 32)
    angles = teacher.model.rotary_emb(u, torch.arange(9)[None])
    torch.testing.assert_close(heads(u, None, angles), whole(u, angles, attention_mask=None)[0], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_layer_that_keeps_all_heads_is_the_teachers_and_one_that_keeps_none_the_students():
    teacher, student = strong_teacher(), tiny_student()
    made = hybrid({2: [3, 1, 2, 0], 0: []}, teacher=teacher)
    assert (made.config.attention_layers, made.config.attention_heads) == ([2], {})
    hidden, positions = torch.randn(2, 9, 32), torch.arange(9)[None]
    angles = made.backbone.rotary_emb(hidden, positions)
    expected = teacher.model.layers[2](hidden, position_embeddings=angles)
    found = made.backbone.layers[2](hidden, position_embeddings=angles)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(made.backbone.layers[0](hidden), student.backbone.layers[0](hidden))
    assert torch.equal(hybrid({}).cpu()(tokens()).logits, student(tokens()).logits)


def test_a_layer_with_heads_has_the_teachers_norms_and_mlp_and_a_mixer_of_the_others():
    teacher = strong_teacher(rms_norm_eps=1e-3)
    made = hybrid({1: [0, 3]}, teacher=teacher)
    block, layer = made.backbone.layers[1], teacher.model.layers[1]
    for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
        given = layer.get_submodule(name).state_dict()
        assert all(torch.equal(own, given[key]) for key, own in block.get_submodule(name).state_dict().items())
    assert block.input_layernorm.variance_epsilon == 1e-3
    assert (block.mixer.n_v_heads, block.mixer.n_qk_heads, block.mixer.out_proj.in_features) == (2, 2, 16)
    assert block.attention.k_proj.out_features == 16 and block.attention.q_proj.out_features == 16
    block.attention.q_proj.weight.data.zero_()
    assert layer.self_attn.q_proj.weight.abs().max() > 0


# --- the cache -----------------------------------------------------------------------------------------------


def bytes_of(cache):
    total = 0
    for layer in cache.layers:
        keys = getattr(layer, "attention", layer)
        found = [getattr(layer, "conv_state", None), getattr(layer, "ssm_state", None), keys.keys, keys.values]
        total += sum(tensor.nbytes for tensor in found if tensor is not None)
    return total


@torch.no_grad()
@pytest.mark.parametrize("layers,heads", [([], {}), ([2], {}), ([], HEADS), ([2], HEADS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_caches_bytes_are_those_of_the_formula(layers, heads, dtype):
    made = hybrid(heads, layers).to(dtype)
    for length in (1, 13):
        cache = made(tokens(3, length), use_cache=True).past_key_values
        assert bytes_of(cache) == cache_bytes(made.config, 3, length, dtype)


@torch.no_grad()
def test_a_prefix_is_shared_and_left_as_it_was():
    made = hybrid(layers=[2])
    prefix, rest = tokens(1, 11), tokens(3, 6, seed=5)
    cache = made(prefix, use_cache=True).past_key_values
    before = bytes_of(cache)
    assert can_share(cache)
    shared = SharedPrefix(cache, batch_size=3)
    expected = made(torch.cat([prefix.expand(3, -1), rest], 1), use_cache=False).logits[:, 11:]
    for _ in range(2):
        torch.testing.assert_close(made(rest, past_key_values=shared).logits, expected, rtol=1e-4, atol=1e-4)
    assert bytes_of(cache) == before


@torch.no_grad()
def test_rows_of_a_cache_are_chosen_and_repeated():
    made, ids = hybrid(), tokens(3, 9)
    expected = made(ids, use_cache=False).logits[[2, 0], 8]
    cache = made(ids[:, :8], use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0]))
    torch.testing.assert_close(made(ids[[2, 0], 8:], past_key_values=cache).logits[:, 0], expected, **TOLERANCE)
    repeated = made(ids[:1, :8], use_cache=True).past_key_values
    repeated.batch_repeat_interleave(2)
    again = made(ids[:1, 8:].expand(2, -1), past_key_values=repeated).logits[:, 0]
    torch.testing.assert_close(again, expected[1:].expand(2, -1), **TOLERANCE)
    with pytest.raises(ValueError, match="cannot be cut back"):
        cache.layers[1].crop(1)
    with pytest.raises(ValueError, match="whose layers are not this model's"):
        made(ids, past_key_values=LlambaCache(tiny_student().config))


@torch.no_grad()
def test_a_cache_that_cannot_be_cut_back_stays_whole():
    made, ids = hybrid(layers=[0], heads={1: [2]}), tokens(2, 9)
    cache = made(ids[:, :8], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be cut back"):
        cache.crop(-3)
    expected = made(ids, use_cache=False).logits[:, 8:]
    torch.testing.assert_close(made(ids[:, 8:], past_key_values=cache).logits, expected, **TOLERANCE)
    cache = hybrid(layers=[0, 1, 2, 3], heads={})(ids, use_cache=True).past_key_values
    cache.crop(-3)
    assert cache.get_seq_length() == 6


# --- saving, training, refusals ------------------------------------------------------------------------------


@torch.no_grad()
def test_it_is_saved_and_loaded_in_its_layout(tmp_path):
    made = hybrid(layers=[2])
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.attention_heads == {"0": [1], "1": [0, 2, 3], "3": [2, 3]}
    assert loaded.config.attention_layers == [2]
    assert torch.equal(loaded(tokens()).logits, made(tokens()).logits)


def test_the_form_of_attention_can_be_changed_for_all_that_attend(monkeypatch):
    made, called = hybrid(layers=[2]), []
    expected = made(tokens(), use_cache=False).logits
    made.set_attn_implementation("eager")
    for module in "llamba.kept_heads", "transformers.models.llama.modeling_llama":
        monkeypatch.setattr(f"{module}.eager_attention_forward", spy(eager_attention_forward, called))
    torch.testing.assert_close(made(tokens(), use_cache=False).logits, expected, **TOLERANCE)
    assert [module.layer_idx for module in called] == [0, 1, 2, 3]


def test_packed_documents_are_refused_by_attention_that_takes_no_mask():
    made = hybrid()
    made.backbone.rotary_emb.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2' takes no mask, and documents would see one another"):
        made(tokens(), seq_idx=torch.zeros(2, 21, dtype=torch.long), use_cache=False)


def spy(attend, called):
    def attend_and_note(module, *args, **kwargs):
        called.append(module)
        return attend(module, *args, **kwargs)

    return attend_and_note


def test_recomputed_gradients_are_the_same_and_reach_every_weight():
    made = hybrid().train()
    gradients = []
    for recomputes in (False, True):
        if recomputes:
            made.gradient_checkpointing_enable({"use_reentrant": False})
        made.zero_grad()
        made(tokens(), use_cache=False).logits.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in made.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"attention_heads": {"4": [0]}}, "layer 4, which is outside 0..3"),
        ({"attention_heads": {"1": [4]}}, r"has \[4\] of layer 1, and a teacher's layer 4 heads"),
        ({"attention_heads": {"1": [0]}, "attention_layers": [1]}, "layer 1, which attention_layers keeps whole"),
        ({"attention_heads": {"1": [0]}, "attention_cfg": None}, "attention_heads is given without attention_cfg"),
        ({"attention_heads": {"1": 0}}, "expected a list of heads for each layer"),
        ({"attention_heads": {"-1": [0]}}, "expected a list of heads for each layer"),
        ({"attention_heads": {"1": [-1]}}, "expected a list of heads for each layer"),
        ({"attention_heads": [[1, 0]]}, "expected a list of heads for each layer"),
        (
            {"attention_heads": {"1": [0]}, "ssm_cfg": {"n_v_heads": 2, "n_qk_heads": 2}},
            r"ssm_cfg.n_v_heads=2\) as in the teacher's attention \(4\)",
        ),
    ],
)
def test_a_layout_that_cannot_be_is_refused(changes, message):
    cfg = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": 8}
    with pytest.raises(ValueError, match=message):
        tiny_config(**{"attention_cfg": cfg, **changes})


@pytest.mark.parametrize(
    "layers,heads,message",
    [
        ([], {4: [0]}, r"--heads 4:0: \[4\] out of range"),
        ([], {1: [0, 4], 2: [5]}, "--heads 1:0,1:4,2:5: 1:4,2:5 out of range; the teacher's layers have heads 0 to 3"),
        ([1], {1: [0]}, r"--heads 1:0: --layers keeps \[1\] whole"),
    ],
)
def test_heads_that_cannot_be_kept(layers, heads, message):
    with pytest.raises(ValueError, match=message):
        check_replacements(tiny_config(), tiny_teacher().config, layers, heads)


def test_mixers_with_another_number_of_heads_are_refused():
    config = LlambaConfig(d_model=32, n_layer=4, ssm_cfg={"n_v_heads": 8, "n_qk_heads": 8})
    with pytest.raises(ValueError, match="a mixer of the student has 8 heads and the teacher's attention 4"):
        check_replacements(config, tiny_teacher().config, [], {1: [0]})


def test_a_hybrid_keeps_its_own_heads():
    made, teacher = hybrid({1: [0, 2], 2: [0, 1, 2, 3]}), tiny_teacher().config
    assert isinstance(made.backbone.layers[1], LlambaBlock)
    check_replacements(made.config, teacher, [], {2: [3, 2, 1, 0], 1: [2, 0]})
    check_replacements(made.config, teacher, [2], {1: [0, 2]})
    for layers, heads in ([2], {}), ([2], {1: [0]}), ([], {}), ([], {1: [0, 2]}):
        with pytest.raises(ValueError, match="hybrid already, with --layers 2 --heads 1:0,1:2 of its teacher"):
            check_replacements(made.config, teacher, layers, heads)
