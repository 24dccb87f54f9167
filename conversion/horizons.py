"""Chooses of each head the horizon with which a decaying sum of its values, without and with its scores, comes closest
to its softmax.

Shapes as in heads.py.
"""

import torch
from torch import Tensor

from conversion.heads import HeadTraces, decay_table, ridge_solution

RIDGE = 1e-3  # of the three weights, in units of each one's own square


def grid(length: int) -> list[float]:
    """Returns the horizons that are tried for windows of so many tokens."""
    return [float(2**i) for i in range(length.bit_length()) if 2**i <= length]


@torch.no_grad()
def choose_horizons(traces: HeadTraces) -> tuple[Tensor, Tensor]:
    """Returns for each head the horizon (H,), out of 1, 2, 4, ... up to the window's length, with which a sum of a
    constant, the scores and the token itself comes closest to its outputs, and their weights (H, 3) in it, by least
    squares.
    """
    v, target = traces.v, traces.target  # (B, H, S, P)
    scores = traces.q @ traces.k.transpose(-1, -2)  # (B, H, S, S)
    best: list[Tensor] = []
    for horizon in grid(v.shape[2]):
        decay = decay_table(horizon, v.shape[2], v.device)  # (S, S)
        parts = (decay @ v, (scores * decay) @ v, v)  # (B, H, S, P) each
        explained, weights = _least_squares(parts, target)
        found = [explained, torch.full_like(explained, horizon), weights]
        if best:
            better = explained > best[0]  # (H,)
            found = [torch.where(better.view(-1, *[1] * (b.dim() - 1)), f, b) for f, b in zip(found, best, strict=True)]
        best = found
    _, horizons, weights = best
    return horizons, weights


def _least_squares(parts: tuple[Tensor, ...], target: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how much of target's square (H,) the closest sum of n parts explains, and its weights (H, n), for each
    head of these (B, H, S, P), in float64.
    """
    X = torch.stack(parts).permute(2, 0, 1, 3, 4).flatten(2).double()  # (H, n, T * P)
    y = target.transpose(0, 1).flatten(1).double()  # (H, T * P)
    gram, along = X @ X.transpose(1, 2), (X @ y[..., None])[..., 0]  # (H, n, n), (H, n)
    weights = ridge_solution(gram, along, RIDGE)
    return 2 * (weights * along).sum(1) - torch.einsum("hm,hmn,hn->h", weights, gram, weights), weights
