"""The mathematics of one mixer against its definition, for every ratio of grouped heads."""

import math

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRotaryEmbedding

from conversion import closed_form
from conversion.build import new_mixer
from conversion.closed_form import copy_projections, decays, fit_mixer, horizons, rows_for_state, spread_decay
from conversion.student_config import student_config

RATIOS = [1, 2, 3, 4, 8]
EXACT = {"rtol": 1e-4, "atol": 1e-4}


def attention_of(ratio, **changes):
    """Returns an attention layer with weights and biases drawn, of two key/value heads for `ratio` query heads each."""
    torch.manual_seed(ratio)
    values = dict(hidden_size=16 * ratio, num_attention_heads=2 * ratio, num_key_value_heads=2, head_dim=8)
    values |= dict(intermediate_size=8, num_hidden_layers=1, vocab_size=8, attention_bias=True)
    config = LlamaConfig(**{**values, **changes})
    config._attn_implementation = "sdpa"
    attention = LlamaAttention(config, 0).requires_grad_(False)
    for name, parameter in attention.named_parameters():
        parameter.normal_(std=1.0 if "bias" in name else 0.3)
    return attention


def mixer_for(attention, **options):
    return new_mixer(student_config(attention.config, **options), seed=0).requires_grad_(False)


def scan_inputs(mixer, u):
    """Returns what the mixer gives its scan for u (B, S, D): x (B, S, H, P), decay (B, S, H), B and C (B, S, H, N)."""
    seen = []
    scan = mixer._scan
    mixer._scan = lambda *inputs: seen.append(inputs) or scan(*inputs)
    mixer(u)
    x, log_decay, B, C, *_ = seen[0]
    return x, log_decay.exp(), B, C


def heads(attention, u, name):
    """Returns what each query head has of a projection, as a loop over heads: (B, S, H, P)."""
    projected = getattr(attention, f"{name}_proj")(u).unflatten(-1, (-1, attention.head_dim))
    group = attention.config.num_attention_heads // projected.shape[2]
    return torch.stack([projected[:, :, h // group] for h in range(attention.config.num_attention_heads)], 2)


def scores(a, b):
    return torch.einsum("bihn,bjhn->bhij", a, b)


def check_definition(attention, mixer, horizon):
    u = torch.randn(2, 12, attention.config.hidden_size)
    x, decay, B, C = scan_inputs(mixer, u)
    q, k, v = (heads(attention, u, name) for name in "qkv")
    factor = math.sqrt(attention.head_dim) / (1 - decays(horizon)).float()  # (H,)
    torch.testing.assert_close(scores(C, B) * factor[:, None, None], scores(q, k), **EXACT)
    torch.testing.assert_close(x, v, **EXACT)
    torch.testing.assert_close(decay, decays(horizon).float().expand_as(decay), **EXACT)


@pytest.mark.parametrize("ratio", RATIOS)
def test_each_head_is_its_attention_head(ratio):
    attention = attention_of(ratio)
    mixer, horizon = mixer_for(attention), horizons(2 * ratio)
    copy_projections(mixer, attention, horizon, constant=False)
    check_definition(attention, mixer, horizon)


@pytest.mark.parametrize("ratio", RATIOS[1:])
def test_repeating_all_rows_instead_of_each_head_is_seen(ratio, monkeypatch):
    """The mapping 0, 1, 0, 1 of query heads to key and value heads, which others have used, fails the definition."""
    attention = attention_of(ratio)
    mixer, horizon = mixer_for(attention), horizons(2 * ratio)
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", lambda self, n, dim: torch.cat([self] * n, dim))
    copy_projections(mixer, attention, horizon, constant=False)
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        check_definition(attention, mixer, horizon)


@pytest.mark.parametrize("ratio", RATIOS)
def test_with_a_constant_the_scores_are_its_sum_with_the_rows_that_are_kept(ratio):
    attention = attention_of(ratio)
    mixer, horizon = mixer_for(attention), horizons(2 * ratio)
    copy_projections(mixer, attention, horizon, constant=True)
    u = torch.randn(2, 12, attention.config.hidden_size)
    _, _, B, C = scan_inputs(mixer, u)
    q, k = (heads(attention, u, name) for name in "qk")
    kept = rows_for_state(8, 7)
    assert kept.tolist() == [3, 7, 2, 6, 1, 5, 0]  # rows of the slowest pair first, the fastest loses one
    expected = 1 + closed_form.SCORE_SCALE * scores(q[..., kept], k[..., kept]) / math.sqrt(8)
    shrink = (1 - decays(horizon)).float()[:, None, None]
    torch.testing.assert_close(scores(C, B) / shrink, expected, **EXACT)


@pytest.mark.parametrize("bias", [True, False])
def test_spreading_the_decay_changes_no_output(bias):
    attention = attention_of(3, attention_bias=bias)
    mixer, horizon = mixer_for(attention, ssm_bias=bias), horizons(6)
    copy_projections(mixer, attention, horizon, constant=True)
    u = torch.randn(2, 12, attention.config.hidden_size)
    before = mixer(u)
    largest = mixer.in_proj.weight.abs().max()
    spread_decay(mixer, horizon)
    torch.testing.assert_close(mixer(u), before, **EXACT)
    x, _, B, C = scan_inputs(mixer, u)
    root = ((1 - decays(horizon)) ** 0.25).float()
    torch.testing.assert_close(x, heads(attention, u, "v") * root[:, None], **EXACT)
    assert mixer.in_proj.weight.abs().max() <= largest


@pytest.mark.parametrize("d_state,head_dim", [(4, 8), (8, 8), (12, 8), (8, 12)])
def test_states_and_heads_of_other_sizes(d_state, head_dim):
    """Heads that are together not as wide as the model get channels of zeros, which change nothing."""
    attention = attention_of(2, head_dim=head_dim)
    config = student_config(attention.config, d_state)
    assert config.headdim >= head_dim and config.d_inner == config.ssm_cfg["expand"] * 32
    mixer, horizon = mixer_for(attention, d_state=d_state), horizons(4)
    copy_projections(mixer, attention, horizon, constant=False)
    u = torch.randn(2, 12, 32)
    x, _, B, C = scan_inputs(mixer, u)
    kept = rows_for_state(head_dim, d_state)
    assert len(kept) == min(d_state, head_dim)
    q, k, v = (heads(attention, u, name) for name in "qkv")
    factor = math.sqrt(head_dim) / (1 - decays(horizon)).float()[:, None, None]
    torch.testing.assert_close(scores(C, B) * factor, scores(q[..., kept], k[..., kept]), **EXACT)
    torch.testing.assert_close(x[..., :head_dim], v, **EXACT)
    y = torch.randn(2, 4, config.headdim)
    expected = y[..., :head_dim].flatten(1) @ attention.o_proj.weight.T
    torch.testing.assert_close(y.flatten(1) @ mixer.out_proj.weight.T, expected, **EXACT)


# --- the fit -------------------------------------------------------------------------------------------------


def traces(attention, n=16, length=32):
    """Returns inputs and outputs of the attention; its keys have a mean, as those of trained models do."""
    u = torch.randn(n, length, attention.config.hidden_size) + 0.5
    angles = LlamaRotaryEmbedding(attention.config)(u, torch.arange(length)[None])
    return u, attention(u, position_embeddings=angles, attention_mask=None)[0]


def relative(mixer, u, a):
    return ((mixer(u) - a).norm() / a.norm()).item()


@pytest.mark.parametrize("bias", [True, False])
def test_the_fit_is_better_than_projections_and_than_zeros_on_other_text(bias):
    attention = attention_of(3, attention_bias=bias)
    u, a = traces(attention, 64)
    other_u, other_a = traces(attention)
    fitted, copied = mixer_for(attention, ssm_bias=bias), mixer_for(attention, ssm_bias=bias)
    fit_mixer(fitted, attention, u, a)
    copy_projections(copied, attention, horizons(6), constant=False)
    assert relative(fitted, other_u, other_a) < min(0.9, relative(copied, other_u, other_a))


@pytest.mark.parametrize("bias", [True, False])
def test_the_fit_of_out_proj_is_the_ridge_regression_of_its_definition(bias, monkeypatch):
    """Against a plain solution on the features themselves, with all outputs of all heads in memory."""
    attention = attention_of(2, attention_bias=bias)
    u, a = traces(attention)
    mixer = mixer_for(attention, ssm_bias=bias)
    monkeypatch.setattr(closed_form, "TOKENS_AT_ONCE", 3 * 32)  # the sums over parts are those over all
    monkeypatch.setattr(closed_form, "fit_output", lambda *_: None)
    monkeypatch.setattr(closed_form, "spread_decay", lambda *_: None)
    fit_mixer(mixer, attention, u, a)
    monkeypatch.undo()
    seen = []
    mixer.out_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    mixer(u)
    g = seen[0].flatten(0, 1).double()  # (T, E)
    W = attention.o_proj.weight.double()
    target = a.flatten(0, 1).double() - (attention.o_proj.bias.double() if bias else 0)
    by_head = torch.stack([part @ w.T for part, w in zip(g.split(8, 1), W.split(8, 1), strict=True)])  # (H, T, D)
    flat = by_head.flatten(1)
    gram = flat @ flat.T
    scales = torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(4), flat @ target.flatten())
    start = W * scales.repeat_interleave(8)
    features = torch.cat([g, torch.ones(len(g), 1)], 1) if bias else g
    penalty = 0.3 * g.square().sum(0).mean() * torch.eye(features.shape[1])
    more = torch.linalg.solve(features.T @ features + penalty, features.T @ (target - g @ start.T))
    moments = closed_form.Moments(mixer)
    moments.add(mixer, u, a)
    closed_form.fit_output(mixer, moments)
    torch.testing.assert_close(mixer.out_proj.weight, (start + more[:32].T).float(), **EXACT)
    if bias:
        expected = attention.o_proj.bias + more[32].float()
        torch.testing.assert_close(mixer.out_proj.bias, expected, **EXACT)


def test_the_decay_of_the_published_layout_is_fitted():
    attention = attention_of(2, attention_bias=False)
    u, other = (0.3 * torch.randn(400, 32) + 1 for _ in range(2))
    mixer, horizon = mixer_for(attention, ssm_bias=False), horizons(4)
    copy_projections(mixer, attention, horizon, constant=True)
    closed_form.fit_decay(mixer, horizon, u)
    _, decay, _, _ = scan_inputs(mixer, other[None])
    found = (-1 / decay.log()).median(1).values[0]  # horizons (H,)
    assert (found / horizon).log().abs().max() < 0.2


def test_an_attention_that_gives_nothing_is_fitted_too():
    attention = attention_of(2, attention_bias=False)
    for parameter in attention.parameters():
        parameter.zero_()
    u, a = traces(attention)
    mixer = mixer_for(attention)
    fit_mixer(mixer, attention, u, a)
    assert (mixer(u) == 0).all()
