"""Heads and layers that copy by construction are found by ablation; the teacher they are planted in is tried first."""

import pytest
import torch

from benchmarks.planted_teacher import VOCAB, planted_teacher
from selection.ablation import Ablations, ablation_scores
from selection.probes import random_copies

WORDS, UNSCORED = 24, 4


def copies(seed):
    return random_copies(range(VOCAB), 4, WORDS, UNSCORED, seed)


def right(scores):
    return sum(scores["copying"].acc) / 4


def found(model, seed):
    """Returns the two layers and the two heads without which copying is worst."""
    layers, heads = ablation_scores(model, [copies(seed)])
    ranked = sorted(((heads[layer][head], (layer, head)) for layer in range(6) for head in range(4)), reverse=True)
    return set(sorted(range(6), key=lambda layer: -layers[layer])[:2]), {place for _, place in ranked[:2]}


@pytest.mark.parametrize("seed", range(3))
def test_it_copies_with_both_heads_alone(seed):
    model, circuit = planted_teacher(seed)
    ablations = Ablations(model, [copies(seed)])
    assert right(ablations.teacher_scores) > 0.9
    for layer, head in circuit.heads:
        assert right(ablations.without(layer, [head])) < 0.1
        others = [other for other in range(4) if other != head]
        assert right(ablations.without(layer, others)) > 0.9


@torch.no_grad()
def test_each_head_looks_where_it_should():
    """One at the token before, the other at the one that followed the present token the last time."""
    model, circuit = planted_teacher(5)
    model.set_attn_implementation("eager")
    ids = copies(5).ids[:1]
    maps = model(ids, output_attentions=True).attentions  # of each layer (1, H, S, S)
    before = maps[circuit.previous[0]][0, circuit.previous[1]]
    assert before.diagonal(-1).min() > 0.95
    after = maps[circuit.induction[0]][0, circuit.induction[1]]
    assert after.diagonal(1 - WORDS)[2:].mean() > 0.95  # the first token is its own predecessor


def test_seeds_plant_elsewhere():
    circuits = [planted_teacher(seed)[1] for seed in range(8)]
    assert len({circuit.induction for circuit in circuits}) > 4
    assert all(circuit.previous[0] < circuit.induction[0] for circuit in circuits)


@pytest.mark.parametrize("seed", range(2))
def test_layers_and_heads_are_found(seed):
    model, circuit = planted_teacher(seed)
    assert found(model, seed) == (circuit.layers, circuit.heads)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.012, 0.02])
@pytest.mark.parametrize("seed", range(20))
def test_in_every_seed(seed, noise):
    model, circuit = planted_teacher(seed, noise=noise)
    assert found(model, seed) == (circuit.layers, circuit.heads)
