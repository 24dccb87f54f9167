"""The mathematics of one mixer against its definition, for every ratio of grouped heads."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conversion import closed_form
from conversion.closed_form import copy_projections, fit_mixer, rows_for_state, spread_decay
from conversion.heads import decays, plain_heads
from conversion.student_config import student_config
from tests.conversion.mixers import (
    EXACT,
    attention_of,
    drawn_fit,
    heads,
    mixer_for,
    pair_scores,
    relative,
    scan_inputs,
    scores,
    tapped,
    traces,
)

RATIOS = [1, 2, 3, 4, 8]


def check_definition(attention, mixer, fit):
    """C . B times sqrt(P) over the head's weight is q . k, x is v, and the decay is that of the horizon."""
    u = torch.randn(2, 12, attention.config.hidden_size)
    x, decay, B, C = scan_inputs(mixer, u)
    q, k, v = (heads(attention, u, name) for name in "qkv")
    factor = math.sqrt(attention.head_dim) / fit.cos
    torch.testing.assert_close(scores(C, B) * factor[:, None], scores(q, k), **EXACT)
    torch.testing.assert_close(x, v, **EXACT)
    torch.testing.assert_close(decay, decays(fit.horizon).float().expand_as(decay), **EXACT)


@pytest.mark.parametrize("ratio", RATIOS)
def test_each_head_is_its_attention_head(ratio):
    attention = attention_of(ratio)
    mixer, fit = mixer_for(attention), plain_heads(2 * ratio)
    copy_projections(mixer, attention, fit)
    check_definition(attention, mixer, fit)


@pytest.mark.parametrize("ratio", RATIOS[1:])
def test_repeating_all_rows_instead_of_each_head_is_seen(ratio, monkeypatch):
    """The mapping 0, 1, 0, 1 of query heads to key and value heads, which others have used, fails the definition."""
    attention = attention_of(ratio)
    mixer, fit = mixer_for(attention), plain_heads(2 * ratio)
    monkeypatch.setattr(torch.Tensor, "repeat_interleave", lambda self, n, dim: torch.cat([self] * n, dim))
    copy_projections(mixer, attention, fit)
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        check_definition(attention, mixer, fit)


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_fitted_head_is_constant_and_turned_pairs_and_skip_of_tapped_values(ratio):
    attention, fit = attention_of(ratio), drawn_fit(2 * ratio)
    mixer = mixer_for(attention)
    copy_projections(mixer, attention, fit)
    u = torch.randn(2, 12, attention.config.hidden_size)
    x, _, B, C = scan_inputs(mixer, u)
    q, k = (heads(attention, u, name) for name in "qk")
    kept = rows_for_state(8, 7)
    assert kept.tolist() == [3, 7, 2, 6, 1, 5, 0]  # rows of the slowest pair first, the fastest loses one
    k = (k - fit.key_mean) * (torch.arange(8) != 4)
    expected = fit.constant[:, None, None] + pair_scores(q, k, fit.cos, fit.sin) / math.sqrt(8)
    torch.testing.assert_close(scores(C, B), expected, **EXACT)
    torch.testing.assert_close(x, tapped(attention, u, fit.taps), **EXACT)
    assert torch.equal(mixer.D, fit.skip)


@pytest.mark.parametrize("bias", [True, False])
def test_spreading_the_decay_changes_no_output(bias):
    attention, fit = attention_of(3, attention_bias=bias), drawn_fit(6)
    mixer = mixer_for(attention, ssm_bias=bias)
    copy_projections(mixer, attention, fit)
    u = torch.randn(2, 12, attention.config.hidden_size)
    before = mixer(u)
    spread_decay(mixer, fit.horizon)
    torch.testing.assert_close(mixer(u), before, rtol=1e-4, atol=1e-4 * before.abs().max().item())
    x, _, B, C = scan_inputs(mixer, u)
    root = ((1 - decays(fit.horizon)) ** 0.25).float()
    torch.testing.assert_close(x, tapped(attention, u, fit.taps) * root[:, None], **EXACT)


@pytest.mark.parametrize("d_state,head_dim", [(4, 8), (8, 8), (12, 8), (8, 12)])
def test_states_and_heads_of_other_sizes(d_state, head_dim):
    """Heads that are together not as wide as the model get channels of zeros, which change nothing."""
    attention = attention_of(2, head_dim=head_dim)
    config = student_config(attention.config, d_state)
    assert config.headdim >= head_dim and config.d_inner == config.ssm_cfg["expand"] * 32
    mixer, fit = mixer_for(attention, d_state=d_state), plain_heads(4)
    copy_projections(mixer, attention, fit)
    u = torch.randn(2, 12, 32)
    x, _, B, C = scan_inputs(mixer, u)
    kept = rows_for_state(head_dim, d_state)
    assert len(kept) == min(d_state, head_dim)
    q, k, v = (heads(attention, u, name) for name in "qkv")
    factor = math.sqrt(head_dim) / fit.cos[:, None]
    torch.testing.assert_close(scores(C, B) * factor, scores(q[..., kept], k[..., kept]), **EXACT)
    torch.testing.assert_close(x[..., :head_dim], v, **EXACT)
    y = torch.randn(2, 4, config.headdim)
    expected = y[..., :head_dim].flatten(1) @ attention.o_proj.weight.T
    torch.testing.assert_close(y.flatten(1) @ mixer.out_proj.weight.T, expected, **EXACT)


# --- the fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_the_fit_is_better_than_projections_and_than_zeros_on_other_text(bias):
    attention = attention_of(3, attention_bias=bias)
    u, a = traces(attention, 64)
    other_u, other_a = traces(attention)
    fitted, copied = mixer_for(attention, ssm_bias=bias), mixer_for(attention, ssm_bias=bias)
    fit_mixer(fitted, attention, u, u, a)
    copy_projections(copied, attention, plain_heads(6))
    assert relative(fitted, other_u, other_a) < min(0.9, relative(copied, other_u, other_a))


@pytest.mark.parametrize("bias", [True, False])
def test_the_fit_of_out_proj_is_the_ridge_regression_of_its_definition(bias, monkeypatch):
    """Against a plain solution on the features themselves, with all outputs of all heads in memory."""
    attention = attention_of(2, attention_bias=bias)
    u, a = traces(attention)
    mixer = mixer_for(attention, ssm_bias=bias)
    monkeypatch.setattr(closed_form, "TOKENS_AT_ONCE", 3 * 32)  # the sums over parts are those over all
    moments = []
    monkeypatch.setattr(closed_form, "fit_output", lambda _mixer, sums: moments.append(sums))
    monkeypatch.setattr(closed_form, "spread_decay", lambda *_: None)
    own = u + 0.1 * torch.randn_like(u)
    fit_mixer(mixer, attention, u, own, a)
    monkeypatch.undo()
    seen = []
    mixer.out_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    mixer(torch.cat([u, own]))
    g = seen[0].flatten(0, 1).double()  # (T, E)
    W = attention.o_proj.weight.double()
    target = torch.cat([a, a]).flatten(0, 1).double() - (attention.o_proj.bias.double() if bias else 0)
    by_head = torch.stack([part @ w.T for part, w in zip(g.split(8, 1), W.split(8, 1), strict=True)])  # (H, T, D)
    flat = by_head.flatten(1)
    gram = flat @ flat.T
    scales = torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(4), flat @ target.flatten())
    start = W * scales.repeat_interleave(8)
    features = torch.cat([g, torch.ones(len(g), 1)], 1) if bias else g
    penalty = 0.3 * g.square().sum(0).mean() * torch.eye(features.shape[1])
    penalty[32:] = 0
    more = torch.linalg.solve(features.T @ features + penalty, features.T @ (target - g @ start.T))
    closed_form.fit_output(mixer, *moments)
    torch.testing.assert_close(mixer.out_proj.weight, (start + more[:32].T).float(), **EXACT)
    if bias:
        expected = attention.o_proj.bias + more[32].float()
        torch.testing.assert_close(mixer.out_proj.bias, expected, **EXACT)


def test_heads_are_chosen_on_the_beginning_of_long_windows(monkeypatch):
    """All scores of a window are in memory then."""
    attention = attention_of(2)
    u, a = traces(attention, 4, 32)
    seen = []
    of_heads = closed_form.head_traces
    monkeypatch.setattr(closed_form, "head_traces", lambda *inputs: seen.append(inputs[1].shape) or of_heads(*inputs))
    for longest, n_tokens in ((8, 4), (32, 64)):
        monkeypatch.setattr(closed_form, "LONGEST_WINDOW", longest)
        monkeypatch.setattr(closed_form, "TOKENS_FOR_HEADS", n_tokens)
        fit_mixer(mixer_for(attention), attention, u, u, a)
    assert [tuple(shape) for shape in seen] == [(1, 8, 32), (2, 32, 32)]


def test_the_decay_of_the_published_layout_is_fitted():
    attention = attention_of(2, attention_bias=False)
    u, other = (0.3 * torch.randn(400, 32) + 1 for _ in range(2))
    mixer, horizon = mixer_for(attention, ssm_bias=False), plain_heads(4).horizon
    copy_projections(mixer, attention, plain_heads(4))
    closed_form.fit_decay(mixer, horizon, u)
    _, decay, _, _ = scan_inputs(mixer, other[None])
    found = (-1 / decay.log()).median(1).values[0]  # horizons (H,)
    assert (found / horizon).log().abs().max() < 0.2


def test_the_decay_takes_the_tokens_in_parts(monkeypatch):
    class Largest(TorchDispatchMode):
        n_rows = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float64 and out.dim() == 2:
                Largest.n_rows = max(Largest.n_rows, len(out))
            return out

    attention, u = attention_of(2, attention_bias=False), torch.randn(400, 32) + 1
    mixers = [mixer_for(attention, ssm_bias=False) for _ in range(2)]
    closed_form.fit_decay(mixers[0], plain_heads(4).horizon, u)
    monkeypatch.setattr(closed_form, "TOKENS_AT_ONCE", 60)
    with Largest():
        closed_form.fit_decay(mixers[1], plain_heads(4).horizon, u)
    assert Largest.n_rows == 60
    rows = [mixer.in_proj.weight[-4:] for mixer in mixers]
    torch.testing.assert_close(*rows)


def test_an_attention_that_gives_nothing_is_fitted_too():
    attention = attention_of(2, attention_bias=False)
    for parameter in attention.parameters():
        parameter.zero_()
    u, a = traces(attention)
    mixer = mixer_for(attention)
    fit_mixer(mixer, attention, u, u, a)
    assert (mixer(u) == 0).all()
