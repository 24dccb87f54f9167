"""Mixers that are fitted beside heads of the teacher: to what these leave, and without the heads in whose place they
are. Such a student is not trained without its heads.
"""

import copy
import functools

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from conversion import closed_form
from conversion.closed_form import Beside, fit_mixer
from llamba.teacher_parts import copied_heads
from model_utils import apply_replacements, check_replacements
from selection.checks import check_pair
from tests.conversion.mixers import attention_of, mixer_for, traces
from tests.tiny import tiny_config, tiny_student, tiny_teacher

KEPT = [1, 4]


def beside(attention, length):
    angles = LlamaRotaryEmbedding(attention.config)(torch.zeros(()), torch.arange(length)[None])
    return Beside(KEPT, functools.partial(copied_heads(attention, KEPT), position_embeddings=angles))


@torch.no_grad()
def test_the_others_are_fitted_to_what_the_kept_heads_leave(monkeypatch):
    """Against a ridge regression of what is left on the features of the other heads alone."""
    monkeypatch.setattr(closed_form, "spread_decay", lambda *_: None)
    attention = attention_of(3, attention_bias=False)
    (u, a), own = traces(attention), torch.randn(16, 32, 48)
    kept, mixer = beside(attention, u.shape[1]), mixer_for(attention, ssm_bias=False)
    seen = []
    mixer.out_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, 1).double()))
    fit_mixer(mixer, attention, u, own, a, kept)
    others = [0, 2, 3, 5]
    g = torch.cat(seen).unflatten(1, (6, 8))[:, others]  # (T, 4, P)
    target = (torch.cat([a, a]) - kept.outputs(torch.cat([u, own]))).flatten(0, 1).double()  # (T, D)
    W = attention.o_proj.weight.double().unflatten(1, (6, 8))[:, others]  # (D, 4, P)
    flat = torch.einsum("thp,dhp->htd", g, W).flatten(1)
    gram = flat @ flat.T
    scales = torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(4), flat @ target.flatten())
    start, g = (W * scales[:, None]).flatten(1), g.flatten(1)
    penalty = 0.3 * g.square().sum(0).mean() * torch.eye(32)
    expected = start + torch.linalg.solve(g.T @ g + penalty, g.T @ (target - g @ start.T)).T
    by_head = mixer.out_proj.weight.unflatten(1, (6, -1))
    torch.testing.assert_close(by_head[:, others].flatten(1), expected.float(), rtol=1e-4, atol=1e-4)
    assert (by_head[:, KEPT] == 0).all()


@torch.no_grad()
def test_the_kept_heads_are_those_of_the_attention():
    """The attention with the others blanked out, without the bias of o_proj, which stays with the mixer."""
    attention = attention_of(3, attention_bias=True)
    u, _ = traces(attention)
    blanked = copy.deepcopy(attention)
    others = [head for head in range(6) if head not in KEPT]
    blanked.o_proj.weight.unflatten(1, (6, -1))[:, others] = 0
    angles = LlamaRotaryEmbedding(attention.config)(u, torch.arange(u.shape[1])[None])
    expected = blanked(u, position_embeddings=angles, attention_mask=None)[0] - attention.o_proj.bias
    torch.testing.assert_close(beside(attention, u.shape[1]).outputs(u), expected, rtol=1e-4, atol=1e-4)


def waiting_config():
    return tiny_config(fitted_beside={"0": [1, 2], "2": [3]})


@pytest.mark.parametrize(
    "layers,heads,missing",
    [([], {}, "0:1,0:2,2:3"), ([1], {}, "0:1,0:2,2:3"), ([0], {2: [0]}, "2:3"), ([], {0: [0, 1, 2]}, "2:3")],
)
def test_a_student_is_not_used_without_the_heads_that_it_waits_for(layers, heads, missing):
    with pytest.raises(ValueError, match="give nothing in their place; add --heads " + missing + ", or take a student"):
        check_replacements(waiting_config(), tiny_teacher().config, layers, heads)


@pytest.mark.parametrize("layers,heads", [([], {0: [1, 2], 2: [3]}), ([2], {0: [0, 1, 2]}), ([0, 2], {})])
def test_with_these_heads_it_is_a_hybrid_like_any_other(layers, heads):
    student = tiny_student(fitted_beside={"0": [1, 2], "2": [3]})
    apply_replacements(student, tiny_teacher(), layers, heads)
    assert student.config.fitted_beside == {}


def test_layers_are_not_chosen_of_such_a_student():
    with pytest.raises(
        ValueError, match="--budget 2: the mixers of --student_model were fitted beside heads .* 0:1,0:2,2:3"
    ):
        check_pair((tiny_teacher().config, waiting_config()), "--budget 2")


def test_a_config_with_such_heads_that_are_none():
    with pytest.raises(ValueError, match="fitted_beside=.*expected a list of heads for each layer"):
        tiny_config(fitted_beside={"0": 1})
