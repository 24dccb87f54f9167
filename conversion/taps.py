"""Fits what the convolution gives as x: of each head, how much of the last values stands beside the token's own. A head
that reads the previous token needs no more than that.

Shapes as in heads.py; K taps of the convolution, lag 0 first.
"""

import torch
from torch import Tensor

from conversion.heads import HeadTraces, decay_table, ridge_solution

RIDGE = 1e-3  # of each feature, in units of its own square
ITERATIONS = 20  # of either side; the error changes by less than a thousandth behind these


@torch.no_grad()
def fit_taps(traces: HeadTraces, horizon: Tensor, n_taps: int) -> tuple[Tensor, Tensor]:
    """Returns taps (H, K) of length 1, and the weights of constant, scores and skip (H, 3), with which the heads come
    closest to their outputs at these horizons (H,). Their product is fitted by alternating least squares.
    """
    found = [_gram(traces, head, float(horizon[head]), n_taps) for head in range(len(horizon))]
    gram, along = (torch.stack(parts) for parts in zip(*found, strict=True))  # (H, 3K, 3K), (H, 3K)
    gram = gram + RIDGE * torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    gram, along = gram.unflatten(2, (3, -1)).unflatten(1, (3, -1)), along.unflatten(1, (3, -1))  # (H, 3, K, 3, K)
    taps = torch.eye(n_taps)[:1].to(along).expand(len(horizon), -1)  # (H, K): the token itself
    weights = along.new_zeros(len(horizon), 3)
    for _ in range(ITERATIONS):
        of_weights = torch.einsum("hakbl,hk,hl->hab", gram, taps, taps)
        weights = ridge_solution(of_weights, torch.einsum("hak,hk->ha", along, taps), 0)
        of_taps = torch.einsum("hakbl,ha,hb->hkl", gram, weights, weights)
        free = ridge_solution(of_taps, torch.einsum("hak,ha->hk", along, weights), 0)
        size = free.norm(dim=1, keepdim=True)  # (H, 1); 0 of a head that gives nothing
        taps, weights = torch.where(size > 0, free / size, taps), weights * size
    return taps, weights


def delayed(v: Tensor, v_bias: Tensor, lag: int) -> Tensor:
    """Returns values (B, H, S, P) of `lag` tokens before, as a convolution gives them: before the beginning its inputs
    are zeros, and its bias is all of the value.
    """
    if lag == 0:
        return v
    before = v_bias[None, :, None].expand(len(v), -1, min(lag, v.shape[2]), -1)
    return torch.cat([before, v[:, :, :-lag]], 2)


def convolved(traces: HeadTraces, taps: Tensor) -> Tensor:
    """Returns x of each head by its taps (H, K): (B, H, S, P)."""
    x = torch.zeros_like(traces.v)
    for lag, weight in enumerate(taps.to(x).unbind(1)):  # (H,)
        x += weight[:, None, None] * delayed(traces.v, traces.v_bias, lag)
    return x


def _gram(traces: HeadTraces, head: int, horizon: float, n_taps: int) -> tuple[Tensor, Tensor]:
    """Returns the inner products of one head's features, constant, scores and skip for each tap, with themselves
    (3K, 3K) and with its outputs (3K,), in float64. Head by head, since the features take 3K times what its values do.
    """
    one = slice(head, head + 1)
    q, k, v, target = (part[:, one] for part in traces[:4])  # (B, 1, S, P)
    decay = decay_table(horizon, q.shape[2], q.device)  # (S, S)
    scores = (q @ k.transpose(-1, -2)) * decay  # (B, 1, S, S)
    lags = torch.stack([delayed(v, traces.v_bias[one], lag) for lag in range(n_taps)])  # (K, B, 1, S, P)
    X = torch.cat([decay @ lags, scores @ lags, lags]).flatten(1).double()  # (3K, T * P)
    return X @ X.T, X @ target.flatten().double()
