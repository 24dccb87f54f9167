"""What a mixer's heads are: the projections of attention by query head, and of each head the horizon and the weights
with which a decaying sum comes closest to its softmax.

Shapes: B windows, S tokens, H query heads, P their width, D width of the model.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

RIDGE = 1e-3  # of the three weights, in units of each one's own square
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


class HeadFit(NamedTuple):
    """Holds what was chosen for each head; all (H,) but for the mean."""

    horizon: Tensor  # tokens until a state has shrunk to 1/e
    score: Tensor  # weight of q . k / sqrt(P)
    skip: Tensor  # weight of the head's own value
    constant: Tensor | None = None  # weight of 1; None: the state has no entry for it
    key_mean: Tensor | None = None  # taken from the keys: (H, P)


def projections(attention: LlamaAttention) -> tuple[Projection, Projection, Projection]:
    """Returns q, k and v by query head. Query head h reads the key and value head h // (H / their number), so that each
    of these is repeated in place: head 0, 0, 1, 1, and not 0, 1, 0, 1.
    """
    n_heads, width = attention.config.num_attention_heads, attention.head_dim

    def by_head(linear: nn.Linear) -> Projection:
        weight = linear.weight.unflatten(0, (-1, width))  # (H or its groups, P, D)
        repeats = n_heads // len(weight)
        bias = None if linear.bias is None else linear.bias.unflatten(0, (-1, width)).repeat_interleave(repeats, dim=0)
        return Projection(weight.repeat_interleave(repeats, dim=0), bias)

    return by_head(attention.q_proj), by_head(attention.k_proj), by_head(attention.v_proj)


def decays(horizon: Tensor) -> Tensor:
    """Returns the factor a by which a state shrinks at a token: after `horizon` tokens 1/e is left. Any shape."""
    return torch.exp(-1 / horizon)


def plain_heads(n_heads: int, device: torch.device | str = "cpu") -> HeadFit:
    """Returns heads that are not fitted: horizons in geometric steps, and the scores of attention as they are, divided
    by how many tokens a head sums over.
    """
    steps = torch.arange(n_heads, dtype=torch.float64, device=device) / max(n_heads - 1, 1)
    horizon = SHORTEST * (LONGEST / SHORTEST) ** steps
    return HeadFit(horizon, (1 - decays(horizon)).float(), torch.zeros(n_heads, device=device))


@torch.no_grad()
def choose_heads(attention: LlamaAttention, inputs: Tensor, kept: Tensor) -> HeadFit:
    """Returns for each head the horizon, out of 1, 2, 4, ... up to the window's length, with which a sum of a constant,
    the scores and the token itself comes closest to the head's output on inputs (B, S, D), by least squares in the
    metric of its columns of o_proj.

    kept: the rows of q and k that the state has room for.
    """
    q, k, v = (projection.of(inputs) for projection in projections(attention))  # (B, H, S, P)
    width, length = q.shape[-1], q.shape[2]
    metric = _metric(attention)  # (H, P, P)
    target = head_outputs(attention, inputs) @ metric  # (B, H, S, P)
    key_mean = k.mean((0, 2))  # (H, P)
    centred = k[..., kept] - key_mean[:, None, kept]
    scores = q[..., kept] @ centred.transpose(-1, -2) / math.sqrt(width)  # (B, H, S, S)
    v = v @ metric
    distance = torch.arange(length, device=v.device)[:, None] - torch.arange(length, device=v.device)  # (S, S)
    best: list[Tensor] = []
    for horizon in grid(length):
        decay = torch.exp(-distance.clamp(min=0) / horizon).tril()  # (S, S)
        parts = (decay @ v, (scores * decay) @ v, v)  # (B, H, S, P) each
        found = [*_least_squares(parts, target), torch.full_like(target[0, :, 0, 0], horizon)]
        if best:
            better = found[0] < best[0]  # (H,)
            found = [torch.where(better.view(-1, *[1] * (b.dim() - 1)), f, b) for f, b in zip(found, best, strict=True)]
        best = found
    _, weights, horizons = best
    constant, score, skip = weights.float().unbind(1)  # (H,) each
    return HeadFit(horizons, score, skip, constant, key_mean)


def grid(length: int) -> list[float]:
    """Returns the horizons that are tried for windows of so many tokens."""
    return [float(2**i) for i in range(length.bit_length()) if 2**i <= length]


def head_outputs(attention: LlamaAttention, inputs: Tensor) -> Tensor:
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


def _metric(attention: LlamaAttention) -> Tensor:
    """Returns of each head a matrix L with |y L| = |o_proj y| for its outputs y: (H, P, P)."""
    columns = attention.o_proj.weight.unflatten(1, (-1, attention.head_dim)).double()  # (D, H, P)
    gram = torch.einsum("dhp,dhq->hpq", columns, columns)
    mean = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)  # (H,)
    identity = torch.eye(gram.shape[1]).to(gram)
    return torch.linalg.cholesky(gram + METRIC_RIDGE * mean[:, None, None] * identity).float()


def _least_squares(parts: tuple[Tensor, ...], target: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the squared error (H,) and the weights (H, n) of the sum of n parts that comes closest to target, for
    each head of these (B, H, S, P), in float64.
    """
    X = torch.stack(parts).permute(2, 0, 1, 3, 4).flatten(2).double()  # (H, n, T * P)
    y = target.transpose(0, 1).flatten(1).double()  # (H, T * P)
    gram, along = X @ X.transpose(1, 2), (X @ y[..., None])[..., 0]  # (H, n, n), (H, n)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    penalty = RIDGE * diagonal + (diagonal == 0)  # of nothing but zeros, zero is the solution
    weights = torch.linalg.solve(gram + torch.diag_embed(penalty), along)  # (H, n)
    explained = 2 * (weights * along).sum(1) - torch.einsum("hm,hmn,hn->h", weights, gram, weights)
    return y.square().sum(1) - explained, weights
