"""The mathematics of one mixer: what it takes over from an attention layer, and what is fitted to the attention's
outputs on some text. Pure functions of two modules and tensors; docs/conversion.md derives them.

    attention:   out_i = o_proj( sum_{j <= i} softmax_j(q_i . k_j / sqrt(P)) v_j )
    mixer:       out_i = out_proj( gate * sum_{j <= i} a^(i - j) (C_i . B_j) x_j )

Of each query head x = v, B = k and C = (1 - a) * SCORE_SCALE / sqrt(P) * q, without rotary embedding; a constant 1 in B
and (1 - a) in C stands for the 1 in softmax(s) ~ 1 + s. Then `fit_output` fits out_proj, and `spread_decay` spreads the
factor (1 - a) evenly over x, B, C and out_proj.

Glossary: D width, H query heads, P width of an attention head, N state of a mixer's head, T tokens, E = d_inner.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention

from llamba import DiscreteMamba2

SHORTEST, LONGEST = 2.0, 256.0  # horizons of the first and the last head, in tokens
SCORE_SCALE = 0.25  # of q . k beside the constant: 1 + s is no longer softmax for the scores of a trained model
HEAD_RIDGE = 1e-3  # of one scale for each head, in units of the mean diagonal
RIDGE = 0.3  # of out_proj, likewise
OPEN_GATE = 1.2785  # silu(OPEN_GATE) = 1
TOKENS_AT_ONCE = 2048  # whose scan is in memory


class Projection(NamedTuple):
    """Holds a projection of attention by query head."""

    weight: Tensor  # (H, P, D)
    bias: Tensor | None  # (H, P)


def horizons(n_heads: int) -> Tensor:
    """Returns how many tokens each head looks back, in geometric steps: (H,) float64."""
    steps = torch.arange(n_heads, dtype=torch.float64) / max(n_heads - 1, 1)
    return SHORTEST * (LONGEST / SHORTEST) ** steps


def decays(horizon: Tensor) -> Tensor:
    """Returns the factor a by which a state shrinks at a token: after `horizon` tokens 1/e is left. Any shape."""
    return torch.exp(-1 / horizon)


def projections(attention: LlamaAttention) -> tuple[Projection, Projection, Projection]:
    """Returns q, k and v by query head. Query head h reads the key and value head h // (H / their number), so that each
    of these is repeated in place: head 0, 0, 1, 1, and not 0, 1, 0, 1.
    """
    config, width = attention.config, attention.head_dim

    def by_head(linear: torch.nn.Linear) -> Projection:
        weight = linear.weight.unflatten(0, (-1, width))  # (H or its groups, P, D)
        repeats = config.num_attention_heads // len(weight)
        bias = None if linear.bias is None else linear.bias.unflatten(0, (-1, width)).repeat_interleave(repeats, 0)
        return Projection(weight.repeat_interleave(repeats, 0), bias)

    return by_head(attention.q_proj), by_head(attention.k_proj), by_head(attention.v_proj)


def rows_for_state(width: int, n_state: int) -> Tensor:
    """Returns which of the `width` rows of q and k a state of `n_state` holds. Rows i and i + width / 2 are rotated as
    a pair, pair 0 the fastest. Where there are too few, those go that turn fastest: they match distance, not content.
    """
    slowest_first = torch.arange(width // 2).flip(0)
    return torch.stack([slowest_first, slowest_first + width // 2], 1).flatten()[:n_state]  # (at most N,)


@torch.no_grad()
def copy_projections(mixer: DiscreteMamba2, attention: LlamaAttention, horizon: Tensor, constant: bool) -> None:
    """Gives a mixer the projections of an attention layer: x = v, B = k, C = (1 - a) / sqrt(P) * q, out_proj = o_proj;
    the convolution passes each token through, the gate is open, D is 0, and heads decay by `horizon` (H,).

    constant: the last entry of the state holds a constant, and C is scaled by SCORE_SCALE. Then and for a state smaller
    than P, the fastest rotated rows of q and k are left out. The decays are set in in_proj's bias; without one they
    have to be fitted (`fit_decay`).
    """
    q, k, v = projections(attention)
    width, n_state = attention.head_dim, mixer.d_state
    kept = rows_for_state(width, n_state - constant)
    shrink = (1 - decays(horizon)).float()  # (H,)
    factor = shrink * (SCORE_SCALE if constant else 1.0) / math.sqrt(width)  # (H,)
    for parameter in mixer.parameters():
        parameter.zero_()
    x, B, C = _rows_of(mixer, mixer.in_proj.weight)  # (H, P, D), (H, N, D), (H, N, D)
    x[:, :width], B[:, : len(kept)] = v.weight, k.weight[:, kept]
    C[:, : len(kept)] = q.weight[:, kept] * factor[:, None, None]
    x, B, C = _rows_of(mixer, mixer.conv1d.bias)  # (H, P), (H, N), (H, N)
    if q.bias is not None and k.bias is not None and v.bias is not None:
        x[:, :width], B[:, : len(kept)] = v.bias, k.bias[:, kept]
        C[:, : len(kept)] = q.bias[:, kept] * factor[:, None]
    if constant:
        B[:, -1], C[:, -1] = 1.0, shrink
    mixer.conv1d.weight[:, 0, -1] = 1.0
    gate = mixer.in_proj.bias[mixer.d_xBC : -mixer.n_v_heads] if mixer.z_bias is None else mixer.z_bias
    gate.fill_(OPEN_GATE)
    if mixer.in_proj.bias is not None:
        mixer.in_proj.bias[-mixer.n_v_heads :] = _decay_logits(horizon).float()
    mixer.out_proj.weight.unflatten(1, (-1, mixer.headdim))[:, :, :width] = attention.o_proj.weight.unflatten(
        1, (-1, width)
    )
    if attention.o_proj.bias is not None:
        mixer.out_proj.bias.copy_(attention.o_proj.bias)


def _rows_of(mixer: DiscreteMamba2, tensor: Tensor | None) -> list[Tensor]:
    """Returns views of the rows of x, B and C by head: (H, P, ...), (H, N, ...), (H, N, ...)."""
    assert tensor is not None  # the convolution has a bias
    sizes = [mixer.d_inner, *[mixer.n_qk_heads * mixer.d_state] * 2]
    return [part.unflatten(0, (mixer.n_v_heads, -1)) for part in tensor[: mixer.d_xBC].split(sizes)]


def _decay_logits(horizon: Tensor) -> Tensor:
    """Returns the A_log with softplus(A_log) = 1 / horizon: of the same shape."""
    return torch.log(torch.expm1(1 / horizon))


@torch.no_grad()
def fit_decay(mixer: DiscreteMamba2, horizon: Tensor, inputs: Tensor) -> None:
    """Sets the rows of A_log so that they come closest to the decays of `horizon` (H,) on inputs (T, D), for a mixer
    whose in_proj has no bias: ridge regression of a constant 1 on the inputs, times each head's A_log.
    """
    u = inputs.double()
    gram = u.T @ u  # (D, D)
    row = torch.linalg.solve(_with_ridge(gram, HEAD_RIDGE), u.sum(0))  # (D,)
    mixer.in_proj.weight[-mixer.n_v_heads :] = (_decay_logits(horizon).to(row.device)[:, None] * row).float()


@torch.no_grad()
def centre_keys(mixer: DiscreteMamba2, inputs: Tensor) -> None:
    """Takes the mean over inputs (T, D) from B, but for its constant: softmax does not see what all keys share."""
    _, weight, _ = _rows_of(mixer, mixer.in_proj.weight)  # (H, N, D)
    _, bias, _ = _rows_of(mixer, mixer.conv1d.bias)  # (H, N)
    mean = torch.einsum("hnd,d->hn", weight.double(), inputs.double().mean(0))
    bias[:, :-1] = -mean[:, :-1].to(bias.dtype)


class Moments:
    """Holds sums over tokens of what enters out_proj, and of the outputs that it should have, in float64: all that a
    least-squares fit of out_proj needs.
    """

    def __init__(self, mixer: DiscreteMamba2) -> None:
        device, n = mixer.out_proj.weight.device, mixer.d_inner + 1  # the last feature is a constant 1
        self.features = torch.zeros(n, n, dtype=torch.float64, device=device)  # (E + 1, E + 1)
        self.targets = torch.zeros(n, len(mixer.out_proj.weight), dtype=torch.float64, device=device)  # (E + 1, D)

    @torch.no_grad()
    def add(self, mixer: DiscreteMamba2, inputs: Tensor, outputs: Tensor) -> None:
        """Adds inputs (B, S, D) of the mixer, and the outputs (B, S, D) that attention has for them."""
        seen: list[Tensor] = []
        hook = mixer.out_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        try:
            mixer(inputs)
        finally:
            hook.remove()
        gated = seen[0].flatten(0, 1).double()  # (T, E)
        gated = torch.cat([gated, gated.new_ones(len(gated), 1)], dim=1)  # (T, E + 1)
        self.features += gated.T @ gated
        self.targets += gated.T @ outputs.flatten(0, 1).double()


@torch.no_grad()
def fit_output(mixer: DiscreteMamba2, moments: Moments) -> None:
    """Fits out_proj: first one scale for each head of what it holds, then, by ridge regression, what this leaves."""
    H, n = mixer.n_v_heads, mixer.d_inner + (mixer.out_proj.bias is not None)
    weight = mixer.out_proj.weight.double()  # (D, E)
    features, targets = moments.features, moments.targets
    if mixer.out_proj.bias is not None:
        targets = targets - features[:, -1:] * mixer.out_proj.bias.double()  # (E + 1, D)
    by_head = weight.T.unflatten(0, (H, -1))  # (H, P, D)
    inner = torch.einsum("hpd,gqd->hpgq", by_head, by_head)  # (H, P, H, P)
    among = (inner * features[:-1, :-1].unflatten(0, (H, -1)).unflatten(2, (H, -1))).sum((1, 3))  # (H, H)
    along = (by_head * targets[:-1].unflatten(0, (H, -1))).sum((1, 2))  # (H,)
    scales = torch.linalg.solve(_with_ridge(among, HEAD_RIDGE), along)  # (H,)
    weight = weight * scales.repeat_interleave(mixer.headdim)  # (D, E)

    left = targets[:n] - features[:n, :-1] @ weight.T  # (n, D)
    gram = features[:n, :n]
    more = torch.linalg.solve(gram + RIDGE * _scale(features[:-1, :-1]) * torch.eye(n).to(gram), left)  # (n, D)
    mixer.out_proj.weight.copy_(weight + more[: mixer.d_inner].T)
    if mixer.out_proj.bias is not None:
        mixer.out_proj.bias.add_(more[-1])


def _with_ridge(gram: Tensor, ridge: float) -> Tensor:
    """Returns a matrix (n, n) of inner products with `ridge` times its mean diagonal added to its diagonal."""
    return gram + ridge * _scale(gram) * torch.eye(len(gram)).to(gram)


def _scale(gram: Tensor) -> Tensor:
    mean = gram.diagonal().mean()
    return torch.where(mean > 0, mean, torch.ones_like(mean))  # of nothing but zeros, zero is the solution


@torch.no_grad()
def spread_decay(mixer: DiscreteMamba2, horizon: Tensor) -> None:
    """Spreads the factor (1 - a) of C evenly over x, B, C and out_proj, the fourth root for each; the function stays
    the same. With all of it in C, the first steps of Adam explode: they are as large for weights a thousandth as large.
    """
    shrink = 1 - decays(horizon)  # (H,)
    root = shrink**0.25
    for tensor in (mixer.in_proj.weight, mixer.conv1d.bias):
        for rows, factor in zip(_rows_of(mixer, tensor), (root, root, root / shrink), strict=True):
            rows *= factor.to(rows).view(-1, *[1] * (rows.dim() - 1))
    mixer.out_proj.weight *= root.to(mixer.out_proj.weight).repeat_interleave(mixer.headdim)


@torch.no_grad()
def fit_mixer(mixer: DiscreteMamba2, attention: LlamaAttention, inputs: Tensor, outputs: Tensor) -> None:
    """Makes a mixer come as close to an attention layer as it can without a gradient step.

    inputs, outputs: of the attention on some windows, (n, S, D) float32.
    """
    horizon = horizons(mixer.n_v_heads)
    copy_projections(mixer, attention, horizon, constant=True)
    if mixer.in_proj.bias is None:
        fit_decay(mixer, horizon, inputs.flatten(0, 1))
    centre_keys(mixer, inputs.flatten(0, 1))
    moments = Moments(mixer)
    at_once = max(1, TOKENS_AT_ONCE // inputs.shape[1])  # windows
    for some, expected in zip(inputs.split(at_once), outputs.split(at_once), strict=True):
        moments.add(mixer, some, expected)
    fit_output(mixer, moments)
    spread_decay(mixer, horizon)
