"""The mathematics of one mixer against its definition, for every ratio of grouped heads."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRotaryEmbedding

from conversion import closed_form
from conversion.build import new_mixer
from conversion.closed_form import copy_projections, fit_mixer, rows_for_state, spread_decay
from conversion.heads import HeadFit, choose_heads, decays, grid, head_outputs, plain_heads
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


def check_definition(attention, mixer, fit):
    """C . B times sqrt(P) over the head's weight is q . k, x is v, and the decay is that of the horizon."""
    u = torch.randn(2, 12, attention.config.hidden_size)
    x, decay, B, C = scan_inputs(mixer, u)
    q, k, v = (heads(attention, u, name) for name in "qkv")
    factor = math.sqrt(attention.head_dim) / fit.score
    torch.testing.assert_close(scores(C, B) * factor[:, None, None], scores(q, k), **EXACT)
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


def drawn_fit(n_heads):
    """Returns a fit with a constant, means, skips, and weights of both signs."""
    weights = torch.randn(3, n_heads)
    return HeadFit(2.0 ** torch.arange(n_heads), weights[0], weights[1], weights[2], torch.randn(n_heads, 8))


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_fitted_head_is_constant_and_scores_and_skip(ratio):
    attention, fit = attention_of(ratio), drawn_fit(2 * ratio)
    mixer = mixer_for(attention)
    copy_projections(mixer, attention, fit)
    u = torch.randn(2, 12, attention.config.hidden_size)
    x, _, B, C = scan_inputs(mixer, u)
    q, k, v = (heads(attention, u, name) for name in "qkv")
    kept = rows_for_state(8, 7)
    assert kept.tolist() == [3, 7, 2, 6, 1, 5, 0]  # rows of the slowest pair first, the fastest loses one
    linear = scores(q[..., kept], (k - fit.key_mean)[..., kept]) / math.sqrt(8)
    expected = fit.constant[:, None, None] + fit.score[:, None, None] * linear
    torch.testing.assert_close(scores(C, B), expected, **EXACT)
    torch.testing.assert_close(x, v, **EXACT)
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
    torch.testing.assert_close(x, heads(attention, u, "v") * root[:, None], **EXACT)


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
    factor = math.sqrt(head_dim) / fit.score[:, None, None]
    torch.testing.assert_close(scores(C, B) * factor, scores(q[..., kept], k[..., kept]), **EXACT)
    torch.testing.assert_close(x[..., :head_dim], v, **EXACT)
    y = torch.randn(2, 4, config.headdim)
    expected = y[..., :head_dim].flatten(1) @ attention.o_proj.weight.T
    torch.testing.assert_close(y.flatten(1) @ mixer.out_proj.weight.T, expected, **EXACT)


# --- what is chosen for each head ----------------------------------------------------------------------------


def test_the_outputs_of_heads_are_those_of_the_attention():
    attention = attention_of(3)
    u, a = traces(attention)
    found = attention.o_proj(head_outputs(attention, u).transpose(1, 2).flatten(2))
    torch.testing.assert_close(found, a, **EXACT)


def test_horizon_and_weights_are_the_best_of_a_plain_search():
    """Against numpy's least squares for each head and each horizon, on outputs of all columns of o_proj."""
    attention = attention_of(2)
    u, _ = traces(attention, 4, 16)
    fit = choose_heads(attention, u, torch.arange(8))
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
        assert fit.horizon[h] == best
        expected = errors[best][1].float()
        torch.testing.assert_close(torch.stack([fit.constant[h], fit.score[h], fit.skip[h]]), expected, **EXACT)


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
    monkeypatch.setattr(closed_form, "fit_output", lambda *_: None)
    monkeypatch.setattr(closed_form, "spread_decay", lambda *_: None)
    own = u + 0.1 * torch.randn_like(u)
    fit_mixer(mixer, attention, u, own, a)
    monkeypatch.undo()
    seen = []
    mixer.out_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    mixer(own)
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
    penalty[32:] = 0
    more = torch.linalg.solve(features.T @ features + penalty, features.T @ (target - g @ start.T))
    moments = closed_form.Moments(mixer)
    moments.add(mixer, own, a)
    closed_form.fit_output(mixer, moments)
    torch.testing.assert_close(mixer.out_proj.weight, (start + more[:32].T).float(), **EXACT)
    if bias:
        expected = attention.o_proj.bias + more[32].float()
        torch.testing.assert_close(mixer.out_proj.bias, expected, **EXACT)


def test_heads_are_chosen_on_the_beginning_of_long_windows(monkeypatch):
    """All scores of a window are in memory then."""
    attention = attention_of(2)
    u, a = traces(attention, 4, 32)
    seen = []
    choose = closed_form.choose_heads
    monkeypatch.setattr(closed_form, "choose_heads", lambda *inputs: seen.append(inputs[1].shape) or choose(*inputs))
    monkeypatch.setattr(closed_form, "TOKENS_FOR_HEADS", 8)
    fit_mixer(mixer_for(attention), attention, u, u, a)
    monkeypatch.setattr(closed_form, "TOKENS_FOR_HEADS", 64)
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
