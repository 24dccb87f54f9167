"""The mathematics of one mixer: what it takes over from an attention layer, and what is fitted to the attention's
outputs on some text. Pure functions of two modules and tensors; docs/conversion.md derives them.

    attention:   out_i = o_proj( sum_{j <= i} softmax_j(q_i . k_j / sqrt(P)) v_j )
    mixer:       out_i = out_proj( gate * (sum_{j <= i} a^(i - j) (C_i . B_j) x_j + D x_i) )

Of each query head B = k without its mean, and C = q / sqrt(P), without rotary embedding; each rotary pair has a weight
and an angle by which C is turned, and a constant in B and C stands for the 1 in softmax(s) ~ 1 + s. x is v of the last
few tokens, by the convolution. The horizon of a, and all weights, are chosen for each head (`choose_heads`). Then
`fit_output` fits out_proj.

Glossary: D width, H query heads, P width of an attention head, N state of a mixer's head, T tokens, E = d_inner.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from conversion.heads import HeadFit, constant_norms, decays, head_traces, projections, rotated
from conversion.horizons import choose_horizons
from conversion.pairs import fit_pairs
from conversion.taps import fit_taps
from llamba import DiscreteMamba2
from llamba.families import Attention

DECAY_RIDGE = 1e-3  # of the decay's row, in units of the mean diagonal
HEAD_RIDGE = 1e-3  # of one scale for each head, likewise
RIDGE = 0.3  # of out_proj, likewise
OPEN_GATE = 1.2785  # silu(OPEN_GATE) = 1
TOKENS_AT_ONCE = 2048  # whose scan is in memory
TOKENS_FOR_HORIZONS = 1024  # to choose three numbers and a horizon for each head; more are no better
TOKENS_FOR_HEADS = 2048  # to fit the taps, and the weights of each pair
LONGEST_WINDOW = 1024  # whose scores are in memory


class Beside(NamedTuple):
    """Holds the heads of an attention that stand beside a mixer, and what they give: inputs (B, S, D) -> (B, S, D)."""

    heads: list[int]
    outputs: Callable[[Tensor], Tensor]


@torch.no_grad()
def copy_projections(mixer: DiscreteMamba2, attention: Attention, fit: HeadFit) -> None:
    """Gives a mixer the projections of an attention layer by what was chosen for each head, and out_proj = o_proj. The
    gate is open.

    With a constant the state's last entry holds it. The decays are set in in_proj's bias; without one they have to be
    fitted (`fit_decay`).
    """
    width = attention.head_dim
    for parameter in mixer.parameters():
        parameter.zero_()
    _copy_heads(mixer, attention, fit)
    mixer.D.copy_(fit.skip)
    mixer.conv1d.weight[:, 0, -1] = 1.0
    if fit.taps is not None:
        x, _, _ = _rows_of(mixer, mixer.conv1d.weight[:, 0])  # (H, P, K)
        x.copy_(fit.taps.flip(1)[:, None])  # the convolution has the token itself last
    gate = mixer.in_proj.bias[mixer.d_xBC : -mixer.n_v_heads] if mixer.z_bias is None else mixer.z_bias
    gate.fill_(OPEN_GATE)
    if mixer.in_proj.bias is not None:
        mixer.in_proj.bias[-mixer.n_v_heads :] = _decay_logits(fit.horizon).float()
    _heads_of_output(mixer)[:, :, :width] = attention.o_proj.weight.unflatten(1, (-1, width))
    if attention.o_proj.bias is not None:
        mixer.out_proj.bias.copy_(attention.o_proj.bias)


def _copy_heads(mixer: DiscreteMamba2, attention: Attention, fit: HeadFit) -> None:
    """Writes the rows of x, B and C, and their biases. B and C have the root of each pair's weight, C has its angle."""
    q, k, v = projections(attention, fit.norms)
    width = attention.head_dim
    kept = rows_for_state(width, mixer.d_state - (fit.constant is not None))
    cos, sin = (part.expand(-1, width // 2).repeat(1, 2)[..., None] for part in (fit.cos, fit.sin))  # (H, P, 1)
    size = cos.hypot(sin)
    root = size.sqrt()  # the share of B
    size = size.clamp(min=torch.finfo(size.dtype).tiny)
    cos, sin = (root * (part / size) / math.sqrt(width) for part in (cos, sin))

    def turned(rows: Tensor) -> Tensor:  # (H, P, n)
        return (rows * cos + rotated(rows) * sin)[:, kept]

    x, B, C = _rows_of(mixer, mixer.in_proj.weight)  # (H, P, D), (H, N, D), (H, N, D)
    x[:, :width], B[:, : len(kept)], C[:, : len(kept)] = v.weight, (k.weight * root)[:, kept], turned(q.weight)
    x, B, C = (rows[..., None] for rows in _rows_of(mixer, mixer.conv1d.bias))  # (H, P, 1), (H, N, 1), (H, N, 1)
    if q.bias is not None and k.bias is not None and v.bias is not None:
        x[:, :width, 0] = v.bias if fit.taps is None else v.bias * fit.taps.sum(1, keepdim=True)
        B[:, : len(kept)], C[:, : len(kept)] = (k.bias[..., None] * root)[:, kept], turned(q.bias[..., None])
    if fit.key_mean is not None:
        B[:, : len(kept)] -= (fit.key_mean[..., None] * root)[:, kept]
    if fit.constant is not None:
        B[:, -1, 0] = fit.constant.abs().sqrt()
        C[:, -1, 0] = B[:, -1, 0] * fit.constant.sign()


def rows_for_state(width: int, n_state: int) -> Tensor:
    """Returns which of the `width` rows of q and k a state of `n_state` holds. Rows i and i + width / 2 are rotated as
    a pair, pair 0 the fastest. Where there are too few, those go that turn fastest: they match distance, not content.
    """
    slowest_first = torch.arange(width // 2).flip(0)
    return torch.stack([slowest_first, slowest_first + width // 2], 1).flatten()[:n_state]  # (at most N,)


@torch.no_grad()
def empty_heads(mixer: DiscreteMamba2, heads: list[int]) -> None:
    """Has some heads of a mixer give nothing."""
    _heads_of_output(mixer)[:, heads] = 0


def _heads_of_output(mixer: DiscreteMamba2) -> Tensor:
    """Returns out_proj's weight by head, as a view: (D, H, channels)."""
    return mixer.out_proj.weight.unflatten(1, (-1, mixer.headdim))


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
    D = inputs.shape[1]
    gram, total = (torch.zeros(size, dtype=torch.float64, device=inputs.device) for size in ((D, D), (D,)))
    for part in inputs.split(TOKENS_AT_ONCE):
        u = part.double()
        gram += u.T @ u
        total += u.sum(0)
    row = torch.linalg.solve(_with_ridge(gram, DECAY_RIDGE), total)  # (D,)
    mixer.in_proj.weight[-mixer.n_v_heads :] = (_decay_logits(horizon).to(row.device)[:, None] * row).float()


class Moments:
    """Holds sums over tokens of what enters out_proj, and of the outputs that it should have, in float64: all that a
    least-squares fit of out_proj needs.
    """

    def __init__(self, mixer: DiscreteMamba2, left_out: Sequence[int] = ()) -> None:
        """left_out: heads of the mixer whose features are zeros."""
        self.left_out = list(left_out)
        device, n = mixer.out_proj.weight.device, mixer.d_inner + 1  # the last feature is a constant 1
        self.features = torch.zeros(n, n, dtype=torch.float64, device=device)  # (E + 1, E + 1)
        self.targets = torch.zeros(n, len(mixer.out_proj.weight), dtype=torch.float64, device=device)  # (E + 1, D)

    @torch.no_grad()
    def add(self, mixer: DiscreteMamba2, inputs: Tensor, outputs: Tensor) -> None:
        """Adds inputs (B, S, D) of the mixer, and the outputs (B, S, D) that it should have for them."""
        seen: list[Tensor] = []
        hook = mixer.out_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        try:
            mixer(inputs)
        finally:
            hook.remove()
        gated = seen[0].flatten(0, 1).double()  # (T, E)
        gated.unflatten(1, (mixer.n_v_heads, -1))[:, self.left_out] = 0
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
    penalty = torch.full((n,), RIDGE, dtype=torch.float64) * _scale(features[:-1, :-1]).cpu()
    penalty[mixer.d_inner :] = 0  # the bias has none
    more = torch.linalg.solve(gram + penalty.diag().to(gram), left)  # (n, D)
    mixer.out_proj.weight.copy_(weight + more[: mixer.d_inner].T)
    if mixer.out_proj.bias is not None:
        mixer.out_proj.bias.add_(more[-1])


def _with_ridge(gram: Tensor, ridge: float) -> Tensor:
    """Returns a matrix (n, n) of inner products with `ridge` times its mean diagonal added to its diagonal."""
    return gram + ridge * _scale(gram) * torch.eye(len(gram)).to(gram)


def _scale(gram: Tensor) -> Tensor:
    """Returns the mean of the diagonal, without features that are nothing but zeros."""
    mean = gram.diagonal().sum() / (gram.diagonal() > 0).sum().clamp(min=1)
    return torch.where(mean > 0, mean, torch.ones_like(mean))  # of nothing but zeros, zero is the solution


@torch.no_grad()
def spread_decay(mixer: DiscreteMamba2, horizon: Tensor) -> None:
    """Moves a part of what makes B and C small for long horizons into x and out_proj, (1 - a)^(1/4) each; the function
    stays the same. With all of it in C, the first steps of Adam explode: they are as large for weights a thousandth as
    large.
    """
    root = (1 - decays(horizon)) ** 0.25  # (H,)
    for tensor in (mixer.in_proj.weight, mixer.conv1d.bias):
        for rows, factor in zip(_rows_of(mixer, tensor), (root, 1 / root, 1 / root), strict=True):
            rows *= factor.to(rows).view(-1, *[1] * (rows.dim() - 1))
    mixer.D.div_(root.to(mixer.D) ** 2)  # it stands beside C . B
    mixer.out_proj.weight *= root.to(mixer.out_proj.weight).repeat_interleave(mixer.headdim)


@torch.no_grad()
def choose_heads(attention: Attention, inputs: Tensor, kept: Tensor, n_taps: int) -> HeadFit:
    """Returns what brings each head closest to its outputs on the first tokens of inputs (B, S, D), by least squares in
    the metric of its columns of o_proj: first the horizon, then the taps, then the weights of the pairs.

    kept: the channels of q and k that the state has room for.
    """
    some = inputs[:, :LONGEST_WINDOW]
    some = some[: max(1, TOKENS_FOR_HEADS // some.shape[1])]
    norms = constant_norms(attention, some)
    traces = head_traces(attention, some, kept, norms)
    horizon, _ = choose_horizons(traces.beginning(TOKENS_FOR_HORIZONS))
    return fit_pairs(traces, horizon, *fit_taps(traces, horizon, n_taps))._replace(norms=norms)


@torch.no_grad()
def fit_mixer(
    mixer: DiscreteMamba2,
    attention: Attention,
    inputs: Tensor,
    own_inputs: Tensor,
    outputs: Tensor,
    kept: Beside | None = None,
) -> None:
    """Makes a mixer come as close to an attention layer as it can without a gradient step.

    inputs, outputs: of the attention on some windows, (n, S, D) float32. own_inputs: what the mixer has in place of
    inputs in a student whose layers before are recurrent too. out_proj is fitted on both, so that it takes back a part
    of the others' errors, and stays right where the layers before are the teacher's. kept: heads of the attention that
    stand beside the mixer. It learns what they leave, without the heads in whose place they are.
    """
    fit = choose_heads(attention, inputs, rows_for_state(attention.head_dim, mixer.d_state - 1), mixer.d_conv)
    copy_projections(mixer, attention, fit)
    if mixer.in_proj.bias is None:
        fit_decay(mixer, fit.horizon, inputs.flatten(0, 1))
    moments = Moments(mixer, () if kept is None else kept.heads)
    at_once = max(1, TOKENS_AT_ONCE // inputs.shape[1])  # windows
    for some in (inputs, own_inputs):
        for part, expected in zip(some.split(at_once), outputs.split(at_once), strict=True):
            moments.add(mixer, part, expected if kept is None else expected - kept.outputs(part))
    fit_output(mixer, moments)
    spread_decay(mixer, fit.horizon)
