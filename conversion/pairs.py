"""Fits how much each rotary pair of q and k counts in a head, and by what angle it is turned: an angle that stands for
the distance at which the head mostly looks.

Shapes as in heads.py; h = P / 2 pairs, and F = P + 2 features: the pairs along, the pairs crosswise, constant and skip.
"""

import torch
from torch import Tensor

from conversion.heads import HeadFit, HeadTraces, decays, ridge_solution
from conversion.taps import convolved

RIDGE = 0.1  # of a pair's distance from the weight of all scores, in units of its feature's own square
SUM_RIDGE = 1e-4  # of those of constant and skip, likewise
EVERY = 4  # tokens: outputs of neighbours are alike


@torch.no_grad()
def fit_pairs(traces: HeadTraces, horizon: Tensor, taps: Tensor, weights: Tensor) -> HeadFit:
    """Returns heads with these horizons (H,) and taps (H, K), and the weights of pairs, constant and skip with which
    they come closest to their outputs: ridge regression towards weights of constant, scores and skip (H, 3).
    """
    n_pairs = traces.q.shape[-1] // 2
    constant, score, skip = weights.double().split(1, 1)  # (H, 1) each
    start = torch.cat([score.expand(-1, n_pairs), torch.zeros_like(score).expand(-1, n_pairs), constant, skip], 1)
    gram, along = _gram(traces, convolved(traces, taps), decays(horizon))  # (H, F, F), (H, F)
    ridge = torch.full_like(start[0], RIDGE)  # (F,)
    ridge[-2:] = SUM_RIDGE
    left = along - torch.einsum("hfg,hg->hf", gram, start)
    found = (start + ridge_solution(gram, left, ridge)).float()  # (H, F)
    cos, sin, constant, skip = found.split([n_pairs, n_pairs, 1, 1], 1)
    return HeadFit(horizon, cos, sin, skip[:, 0], constant[:, 0], traces.key_mean, taps.float())


def _gram(traces: HeadTraces, x: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the inner products of the features with themselves (H, F, F) and with the outputs (H, F), in float64.

    x: (B, H, S, P); decay: (H,). The features of a head at a token are P + 2 times as large as its output. Therefore
    token after token, as in a scan, and only those of one are in memory.
    """
    q, k, _, target = traces[:4]  # (B, H, S, P)
    n_windows, n_heads, length, width = q.shape
    decay = decay.to(x).view(-1, 1, 1)
    state, total = x.new_zeros(n_windows, n_heads, width, width), torch.zeros_like(x[:, :, :1])  # (B, H, P, P)
    gram = torch.zeros(n_heads, width + 2, width + 2, dtype=torch.float64, device=x.device)
    along = torch.zeros_like(gram[..., 0])
    for token in range(length):
        at = slice(token, token + 1)
        state = torch.addcmul(state * decay, k[:, :, at].transpose(2, 3), x[:, :, at])
        total = total * decay + x[:, :, at]  # (B, H, 1, P)
        if (token + 1) % EVERY:
            continue
        first, second = state.chunk(2, 2)  # (B, H, h, P): what the state holds for p and for p + h
        q_first, q_second = q[:, :, at].transpose(2, 3).chunk(2, 2)  # (B, H, h, 1)
        cos, sin = q_first * first + q_second * second, q_first * second - q_second * first
        X = torch.cat([cos, sin, total, x[:, :, at]], 2)  # (B, H, F, P)
        X = X.permute(1, 2, 0, 3).flatten(2).double()  # (H, F, B * P)
        y = target[:, :, token].transpose(0, 1).flatten(1).double()  # (H, B * P)
        gram += X @ X.transpose(1, 2)
        along += (X @ y[..., None])[..., 0]
    return gram, along
