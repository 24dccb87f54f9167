"""What is chosen for each head: its horizon, its taps, and the weight and the angle of each rotary pair."""

import math

import pytest
import torch

from conversion import pairs
from conversion.closed_form import choose_heads, copy_projections, rows_for_state
from conversion.heads import decays, head_outputs, head_traces
from conversion.horizons import choose_horizons, grid
from conversion.pairs import fit_pairs
from conversion.taps import convolved, fit_taps
from tests.conversion.mixers import EXACT, attention_of, drawn_fit, heads, mixer_for, pair_scores, relative, traces


def test_the_outputs_of_heads_are_those_of_the_attention():
    attention = attention_of(3)
    u, a = traces(attention)
    found = attention.o_proj(head_outputs(attention, u).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, a, **EXACT)


def test_horizon_and_weights_are_the_best_of_a_plain_search():
    """Against numpy's least squares for each head and each horizon, on outputs of all columns of o_proj."""
    attention = attention_of(2)
    u, _ = traces(attention, 4, 16)
    horizons, found = choose_horizons(head_traces(attention, u, torch.arange(8)))
    assert grid(16) == [1, 2, 4, 8, 16] and grid(17) == grid(16)
    q, k, v = (heads(attention, u, name).double() for name in "qkv")
    outputs = head_outputs(attention, u).double()
    k = k - k.mean((0, 1))
    for h in range(4):
        columns = attention.o_proj.weight[:, 8 * h : 8 * h + 8].double().T
        target = (outputs[:, h] @ columns).flatten()
        errors = {}
        for horizon in grid(16):
            decay = torch.exp(-(torch.arange(16)[:, None] - torch.arange(16)) / horizon).tril().double()
            linear = q[:, :, h] @ k[:, :, h].transpose(1, 2) / math.sqrt(8) * decay
            parts = [weights @ v[:, :, h] for weights in (decay, linear)] + [v[:, :, h]]
            X = torch.stack([(part @ columns).flatten() for part in parts], 1)
            gram = X.T @ X
            weights = torch.linalg.solve(gram + 1e-3 * gram.diagonal().diag(), X.T @ target)
            errors[horizon] = ((X @ weights - target).square().sum().item(), weights)
        best = min(errors, key=lambda horizon: errors[horizon][0])
        assert horizons[h] == best
        torch.testing.assert_close(found[h], errors[best][1], **EXACT)


def previous_token_attention():
    """Returns an attention of whose scores the largest, by far, is always that of the previous token."""
    attention = attention_of(2)
    speed = 1 / 10000 ** (torch.arange(4) / 4)  # of each pair, in radians a token
    ahead = 1000 * torch.cat([speed.cos(), -speed.sin()])  # a key as it is one token later
    attention.q_proj.weight.zero_(), attention.k_proj.weight.zero_()
    attention.q_proj.bias.copy_(ahead.repeat(4))
    attention.k_proj.bias.copy_(torch.tensor([1.0] * 4 + [0.0] * 4).repeat(2))
    return attention


def error_behind_the_first(attention, fit):
    """Returns the relative error of the mixer of a fit on other text. The first token has no previous one."""
    mixer = mixer_for(attention)
    copy_projections(mixer, attention, fit)
    u, a = traces(attention)
    return ((mixer(u) - a)[:, 1:].norm() / a[:, 1:].norm()).item()


def test_the_taps_find_a_previous_token_head():
    attention = previous_token_attention()
    u, _ = traces(attention)
    kept = rows_for_state(8, 7)
    assert error_behind_the_first(attention, choose_heads(attention, u, kept, 4)) < 0.05
    without = choose_heads(attention, u, kept, 1)._replace(taps=None)
    assert error_behind_the_first(attention, without) > 0.3


def slow_pair_attention():
    """Returns an attention that scores by one pair alone, which turns by about a radian over its windows."""
    attention = attention_of(2)
    for projection in (attention.q_proj, attention.k_proj):
        rows = projection.weight.unflatten(0, (-1, 8))
        rows[:, [0, 2, 3, 4, 6, 7]] = 0
        projection.bias.zero_()
    return attention


def test_scores_of_a_pair_that_turns_need_its_angle(monkeypatch):
    """Without the angle the fit is worse, and with the opposite one worse still."""
    monkeypatch.setattr(pairs, "EVERY", 1)  # windows are short
    attention = slow_pair_attention()
    u, a = traces(attention, 64)
    some = head_traces(attention, u, rows_for_state(8, 7))
    horizon, _ = choose_horizons(some)
    taps, weights = fit_taps(some, horizon, 4)
    fit = fit_pairs(some, horizon, taps, weights)
    constant, score, skip = weights.float().split(1, 1)
    straight = fit._replace(cos=score, sin=torch.zeros_like(score), skip=skip[:, 0], constant=constant[:, 0])
    errors = []
    for heads_fit in (fit, straight, fit._replace(sin=-fit.sin)):
        mixer = mixer_for(attention)
        copy_projections(mixer, attention, heads_fit)
        errors.append(relative(mixer, u, a))
    assert (fit.sin[:, 1] > 0.2 * fit.cos[:, 1]).all()
    assert errors == sorted(errors) and errors[2] - errors[0] > 0.01, errors


@pytest.mark.parametrize("ratio", [1, 3])
def test_of_heads_that_are_linear_all_is_found(ratio, monkeypatch):
    """Heads whose outputs are a decaying sum with a weight and an angle for each pair have these very weights."""
    monkeypatch.setattr(pairs, "RIDGE", 1e-9)
    monkeypatch.setattr(pairs, "SUM_RIDGE", 1e-9)
    attention, fit = attention_of(ratio), drawn_fit(2 * ratio)
    u, _ = traces(attention, 8, 64)
    some = head_traces(attention, u, torch.arange(8))
    q, k = some.q.transpose(1, 2), some.k.transpose(1, 2)  # (B, S, H, P)
    mixed = pair_scores(q, k, fit.cos, fit.sin) + fit.constant[:, None, None]
    distance = torch.arange(64)[:, None] - torch.arange(64)
    table = (decays(fit.horizon)[:, None, None] ** distance.clamp(min=0)).tril()
    x = convolved(some, fit.taps)
    linear = some._replace(target=(mixed * table) @ x + fit.skip[:, None, None] * x)
    found = fit_pairs(linear, fit.horizon, fit.taps, torch.randn(2 * ratio, 3))
    for name in ("cos", "sin", "skip", "constant"):
        torch.testing.assert_close(getattr(found, name), getattr(fit, name), rtol=1e-3, atol=1e-3)


def test_rows_that_are_not_kept_do_not_count():
    attention = attention_of(2)
    u, _ = traces(attention, 4)
    some = head_traces(attention, u, torch.tensor([3, 7]))
    dropped = [0, 1, 2, 4, 5, 6]
    assert (some.k[..., dropped] == 0).all() and (some.k[..., [3, 7]] != 0).any()
    fit = choose_heads(attention, u, torch.tensor([3, 7]), 4)
    assert all(part.isfinite().all() for part in fit if part is not None)
