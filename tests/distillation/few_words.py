"""A model of few weights for tests of exchanges between ranks, and how it learns."""

import math

import torch
from torch import nn


class Words(nn.Module):
    """Has an embedding of which few rows are used, matrices, vectors, and a frozen part."""

    def __init__(self, dtype, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(103, 8)
        self.frozen = nn.Linear(8, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 103, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.to(dtype)
        self.frozen.requires_grad_(False)

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.frozen(self.embedding(ids))))).float()


def groups_of(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]


def backward_order(model):
    return list(model.parameters())[::-1]


def learn(model, exchange, rank, steps=5, broken=None):
    """Takes optimizer steps of two micro steps; in that of number `broken` rank 1 has a gradient that is not finite."""
    norms = []
    for step in range(steps):
        for micro_step in range(2):
            ids = torch.randint(103, (2, 5), generator=torch.Generator().manual_seed(10 * step + 2 * micro_step + rank))
            exchange.begin(is_last=micro_step == 1)
            factor = float("nan") if (step, rank, micro_step) == (broken, 1, 1) else 1.0
            (model(ids).square().mean() * factor).backward()
        norms.append(exchange.norm())
        if math.isfinite(norms[-1]):
            exchange.step(min(1.0, 0.01 / norms[-1]))
        exchange.clear()
    return norms


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}
