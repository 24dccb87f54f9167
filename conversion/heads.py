"""What a mixer's heads are: the projections of attention by query head, and what is chosen for each head so that a
decaying sum comes as close to its softmax as it can.

Shapes: B windows, S tokens, H query heads, P their width, D width of the model.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llamba.families import FAMILIES, Attention

METRIC_RIDGE = 1e-6  # of what o_proj does not see, in units of the mean diagonal
SHORTEST, LONGEST = 2.0, 256.0  # horizons of the first and the last head where none are chosen, in tokens


class Projection(NamedTuple):
    """Holds a projection of attention by query head."""

    weight: Tensor  # (H, P, D)
    bias: Tensor | None  # (H, P)

    def of(self, inputs: Tensor) -> Tensor:
        """Returns what each head has for inputs (B, S, D): (B, H, S, P)."""
        flat = None if self.bias is None else self.bias.flatten()
        return (
            nn.functional.linear(inputs, self.weight.flatten(0, 1), flat)
            .unflatten(-1, (len(self.weight), -1))
            .transpose(1, 2)
        )

    def times(self, factors: Tensor) -> "Projection":
        """Returns the projection with each channel multiplied by its factor (H, P)."""
        return Projection(self.weight * factors[..., None], None if self.bias is None else self.bias * factors)


class HeadFit(NamedTuple):
    """Holds what was chosen for each head.

    Channels p and p + P / 2 of q and k are pair p of the rotary embedding. `cos` weighs what both give together,
    q_p k_p + q_p' k_p', and `sin` what they give crosswise, q_p k_p' - q_p' k_p, with p' = p + P / 2.
    """

    horizon: Tensor  # tokens until a state has shrunk to 1/e: (H,)
    cos: Tensor  # weights of q . k / sqrt(P) for each pair: (H, P / 2), or (H, 1) for one that all pairs share
    sin: Tensor  # of the same shape
    skip: Tensor  # weight of the head's own x: (H,)
    constant: Tensor | None = None  # weight of 1: (H,); None: the state has no entry for it
    key_mean: Tensor | None = None  # taken from the keys: (H, P)
    taps: Tensor | None = None  # weights of the last values in x, the token's own first: (H, K); None: its own alone
    norms: Tensor | None = None  # what stands for 1 / rms in the norms of q and k: (2, H); None: there are no norms


class HeadTraces(NamedTuple):
    """Holds what the heads of an attention have on some text: (B, H, S, P) each, but for the last two. Values and
    targets are in a metric in which lengths are those behind o_proj.
    """

    q: Tensor  # without rotary embedding, over sqrt(P)
    k: Tensor  # likewise, without its mean; zeros in channels for which the state has no room
    v: Tensor
    target: Tensor  # the softmax outputs
    v_bias: Tensor  # what v has for an input of zeros: (H, P)
    key_mean: Tensor  # (H, P)

    def beginning(self, n_tokens: int) -> "HeadTraces":
        """Returns the traces of the first windows, of at most so many tokens, or of the first window alone."""
        few = max(1, n_tokens // self.q.shape[2])
        q, k, v, target = (part[:few] for part in self[:4])
        return self._replace(q=q, k=k, v=v, target=target)


def projections(attention: Attention, norms: Tensor | None = None) -> tuple[Projection, Projection, Projection]:
    """Returns q, k and v by query head. Query head h reads the key and value head h // (H / their number), so that each
    of these is repeated in place: head 0, 0, 1, 1, and not 0, 1, 0, 1.

    norms (2, H): of a `HeadFit`. Without them q and k are as they are before any norm.
    """
    n_heads, width = attention.config.num_attention_heads, attention.head_dim

    def by_head(linear: nn.Linear) -> Projection:
        weight = linear.weight.unflatten(0, (-1, width))  # (H or its groups, P, D)
        repeats = n_heads // len(weight)
        bias = None if linear.bias is None else linear.bias.unflatten(0, (-1, width)).repeat_interleave(repeats, dim=0)
        return Projection(weight.repeat_interleave(repeats, dim=0), bias)

    q, k, v = by_head(attention.q_proj), by_head(attention.k_proj), by_head(attention.v_proj)
    if norms is None:
        return q, k, v
    return q.times(attention.q_norm.weight * norms[0, :, None]), k.times(attention.k_norm.weight * norms[1, :, None]), v


@torch.no_grad()
def constant_norms(attention: Attention, inputs: Tensor) -> Tensor | None:
    """Returns the factors that come closest to the norms of q and k in each head on inputs (B, S, D): (2, H). A norm
    divides every token by another number, its rms, which a mixer's B and C, linear in its inputs, cannot do. None where
    attention has no norms.
    """
    if not FAMILIES[attention.config.model_type].normed_heads:
        return None
    q, k, _ = projections(attention)

    def factors(projection: Projection, eps: float) -> Tensor:  # (H,): the least squares of z / rms(z) by z
        square = projection.of(inputs).square().mean(-1)  # (B, H, S)
        total = square.sum((0, 2))
        along = (square * torch.rsqrt(square + eps)).sum((0, 2))
        return along / total.where(total > 0, 1.0)

    norms = (attention.q_norm, attention.k_norm)
    return torch.stack([factors(z, norm.variance_epsilon) for z, norm in zip((q, k), norms, strict=True)])


def decays(horizon: Tensor) -> Tensor:
    """Returns the factor a by which a state shrinks at a token: after `horizon` tokens 1/e is left. Any shape."""
    return torch.exp(-1 / horizon)


def decay_table(horizon: float, length: int, device: torch.device) -> Tensor:
    """Returns how much of token j a state still holds at token i, for i, j < length; zero for j > i: (S, S)."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)  # (S, S)
    return torch.exp(-distance.clamp(min=0) / horizon).tril()


def plain_heads(n_heads: int, device: torch.device | str = "cpu") -> HeadFit:
    """Returns heads that are not fitted: horizons in geometric steps, and the scores of attention as they are, divided
    by how many tokens a head sums over.
    """
    steps = torch.arange(n_heads, dtype=torch.float64, device=device) / max(n_heads - 1, 1)
    horizon = SHORTEST * (LONGEST / SHORTEST) ** steps
    cos = (1 - decays(horizon)).float()[:, None]
    return HeadFit(horizon, cos, torch.zeros_like(cos), torch.zeros(n_heads, device=device))


def rotated(rows: Tensor) -> Tensor:
    """Returns rows of q or k (H, P, ...) with each pair turned by a right angle: -p' in place of p, p in that of p'."""
    first, second = rows.chunk(2, 1)
    return torch.cat([-second, first], 1)


@torch.no_grad()
def head_traces(attention: Attention, inputs: Tensor, kept: Tensor, norms: Tensor | None = None) -> HeadTraces:
    """Returns what the heads have on inputs (B, S, D). kept: the channels of k that the state has room for. norms: of a
    `HeadFit`; the targets are those of the attention itself.
    """
    of_q, of_k, of_v = projections(attention, norms)
    k = of_k.of(inputs)  # (B, H, S, P)
    key_mean = k.mean((0, 2))  # (H, P)
    room = torch.zeros(k.shape[-1]).index_fill(0, kept, 1.0).to(k)  # (P,)
    metric = _metric(attention)  # (H, P, P)
    v_bias = of_v.weight.new_zeros(key_mean.shape) if of_v.bias is None else of_v.bias  # (H, P)
    return HeadTraces(
        of_q.of(inputs) / math.sqrt(k.shape[-1]),
        (k - key_mean[:, None]) * room,
        of_v.of(inputs) @ metric,
        head_outputs(attention, inputs) @ metric,
        (v_bias[:, None] @ metric)[:, 0],
        key_mean,
    )


def head_outputs(attention: Attention, inputs: Tensor) -> Tensor:
    """Returns the softmax outputs of each head, before o_proj, for inputs (B, S, D): (B, H, S, P)."""
    seen: list[Tensor] = []
    angles = LlamaRotaryEmbedding(attention.config).to(inputs.device)(
        inputs, torch.arange(inputs.shape[1], device=inputs.device)[None]
    )
    hook = attention.o_proj.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        attention(inputs, position_embeddings=angles, attention_mask=None)
    finally:
        hook.remove()
    return seen[0].unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _metric(attention: Attention) -> Tensor:
    """Returns of each head a matrix L with |y L| = |o_proj y| for its outputs y: (H, P, P)."""
    columns = attention.o_proj.weight.unflatten(1, (-1, attention.head_dim)).double()  # (D, H, P)
    gram = torch.einsum("dhp,dhq->hpq", columns, columns)
    mean = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)  # (H,)
    identity = torch.eye(gram.shape[1]).to(gram)
    return torch.linalg.cholesky(gram + METRIC_RIDGE * mean[:, None, None] * identity).float()


def ridge_solution(gram: Tensor, along: Tensor, ridge: float | Tensor) -> Tensor:
    """Returns the weights (..., n) that solve (gram + ridge * its diagonal) weights = along, for inner products
    (..., n, n) and a ridge that is a number or (n,). A feature of nothing but zeros has the weight 0.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    penalty = ridge * diagonal + (diagonal == 0)
    return torch.linalg.solve(gram + torch.diag_embed(penalty), along)
