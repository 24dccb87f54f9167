"""The exchange of gradients with the owners of weights, on real ranks, against one process and against DDP."""

import torch
from torch import nn

from distillation.changes import apply_changes, encode_changes, most_longer
from distillation.owners import Owners
from tests.two_ranks import on_two_ranks


def bits(values):
    return torch.tensor(values, dtype=torch.int16).view(torch.bfloat16)


def test_any_two_weights_are_coded():
    generator = torch.Generator().manual_seed(0)
    old = torch.randint(-(2**15), 2**15, (40_000,), generator=generator, dtype=torch.int16)
    step = torch.tensor([0, 1, -1, 2, -2, -(2**15), 77], dtype=torch.int16)
    new = old + step[torch.randint(7, (40_000,), generator=generator)]
    old[:6] = torch.tensor([0, -(2**15), 32767, -1, 0x7FC0, 0x3F80])  # 0, -0.0, NaNs, 1
    new[:6] = torch.tensor([-(2**15), 0, -(2**15), 0, 0x7FC1, -0x4080])
    codes, longer, count = encode_changes(old.view(torch.bfloat16), new.view(torch.bfloat16))
    weights = old.clone().view(torch.bfloat16)
    apply_changes(weights, codes, longer[: int(count)])
    assert torch.equal(weights.view(torch.int16), new)
    assert len(codes) == 10_000 and 0.5 < count / 40_000 < 0.6


def test_more_than_fit_are_counted():
    old = torch.zeros(16, dtype=torch.bfloat16)
    codes, longer, count = encode_changes(old, torch.ones(16, dtype=torch.bfloat16))
    assert count == 16 and len(longer) == most_longer(16) == 14
    same = encode_changes(old, old)
    assert same[2] == 0 and not same[0].any()


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


def learn(model, exchange, rank, steps, lr=None):
    for step in range(steps):
        for micro_step in range(2):
            ids = torch.randint(103, (2, 5), generator=torch.Generator().manual_seed(10 * step + 2 * micro_step + rank))
            exchange.begin(is_last=micro_step == 1)
            model(ids).square().mean().backward()
        norm = exchange.norm()
        exchange.step(min(1.0, 0.01 / norm))
        exchange.clear()
    return norm


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_owners(ranks):
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for tied in (False, True):
            for size in (200, 10**6):
                model = Words(dtype, tied)
                rows = None if tied else model.embedding.weight
                exchange = Owners(model, groups_of(model), 1e-2, by_rows=rows, bucket_bytes=size)
                norm = learn(model, exchange, ranks.rank, 5)
                found[dtype, tied, size] = (norm, weights(model), len(exchange.buckets))
    return found


def test_ranks_agree_whatever_the_buckets(tmp_path):
    one, other = on_two_ranks(by_owners, tmp_path)
    for key, (norm, found, n) in one.items():
        assert norm == other[key][0]
        for name, value in found.items():
            assert torch.equal(value, other[key][1][name]), (key, name)
        small = one[(*key[:2], 200)]
        assert small[0] == norm and all(torch.equal(value, small[1][name]) for name, value in found.items())
        print(key, n, norm)
    assert one[torch.float32, False, 200][2] > one[torch.float32, False, 10**6][2]
