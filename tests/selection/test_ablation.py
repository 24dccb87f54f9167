"""Scores of ablated heads, against whole models whose weights were set to zero."""

import copy

import pytest
import torch

from selection.ablation import Ablations, ablation_scores, growth, mean_growth
from selection.probes import random_copies
from tests.tiny import tiny_teacher

PROBES = [random_copies(range(50), 3, 8, 2, seed=0), random_copies(range(20), 2, 12, 3, seed=1)]
PROBES[1] = type(PROBES[1])("other", *(getattr(PROBES[1], name) for name in ("ids", "answer", "text", "chance")))


@pytest.fixture(scope="module")
def teacher():
    return tiny_teacher(initializer_range=0.3)


@torch.no_grad()
def brute_force(teacher, probe):
    """Returns the loss of each text by plain logits."""
    losses = []
    for row in range(len(probe.ids)):
        places = (probe.answer[row] >= 0).nonzero()[:, 0]
        log_p = teacher(probe.ids[row : row + 1]).logits[0].log_softmax(-1)
        losses.append(-log_p[places - 1, probe.ids[row, places]].mean().item())
    return losses


@pytest.mark.parametrize("layer,heads", [(0, [1]), (2, [0, 3]), (3, [2]), (1, None)])
def test_a_zeroed_head_is_a_head_without_its_columns(teacher, layer, heads):
    ablations = Ablations(teacher, PROBES)
    without = copy.deepcopy(teacher)
    width = without.config.head_dim
    for head in range(4) if heads is None else heads:
        without.model.layers[layer].self_attn.o_proj.weight.data[:, head * width : (head + 1) * width] = 0
    scores = ablations.without(layer, heads)
    for probe in PROBES:
        assert scores[probe.name].loss == pytest.approx(brute_force(without, probe), abs=1e-5)
        assert ablations.teacher_scores[probe.name].loss == pytest.approx(brute_force(teacher, probe), abs=1e-5)
    assert ablations.without(layer, []) == ablations.teacher_scores  # nothing stays behind


def test_the_scores_of_all_heads_and_layers(teacher):
    layers, heads = ablation_scores(teacher, PROBES)
    assert len(layers) == 4 and [len(row) for row in heads] == [4] * 4
    ablations = Ablations(teacher, PROBES)
    own, found = ablations.teacher_scores, ablations.without(2, [1])
    means = [sum(growth(found[probe.name], own[probe.name])) / probe.n_texts for probe in PROBES]
    assert heads[2][1] == pytest.approx(sum(means) / 2) and layers[2] == mean_growth(ablations.without(2), own)
    assert mean_growth({}, {}) == 0
