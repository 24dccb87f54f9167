"""Hybrids scored from stored states, against hybrids that are built whole and run."""

import copy
import itertools

import pytest
import torch

from model_utils import apply_replacements
from selection.probes import random_copies
from selection.swaps import Swaps, common_base, share_models
from tests.tiny import tiny_student, tiny_teacher, tokens

WINDOWS = tokens(3, 22)
PROBES = [random_copies(range(50), 2, 8, 2, seed=0)]


@pytest.fixture(scope="module")
def models():
    return tiny_teacher(initializer_range=0.3), tiny_student()


@torch.no_grad()
def whole(models, recurrent):
    """Returns KLs and probe losses of the hybrid that `--layers` makes."""
    teacher, hybrid = models[0], copy.deepcopy(models[1])
    apply_replacements(hybrid, teacher, [i for i in range(4) if i not in recurrent])
    q = teacher(WINDOWS[:, :-1]).logits.log_softmax(-1)  # (n, S, V)
    p = hybrid(WINDOWS[:, :-1]).logits.log_softmax(-1)
    log_p = hybrid(PROBES[0].ids).logits.log_softmax(-1)[:, :-1].gather(-1, PROBES[0].ids[:, 1:, None])[..., 0]
    is_answer = PROBES[0].answer[:, 1:] >= 0
    losses = [-row[mask].mean().item() for row, mask in zip(log_p, is_answer, strict=True)]
    return (q.exp() * (q - p)).sum(-1).mean(-1).tolist(), losses


def test_every_set_has_the_figures_of_the_whole_hybrid(models):
    swaps = Swaps(*models, WINDOWS, PROBES)
    sets = [frozenset(some) for n in range(5) for some in itertools.combinations(range(4), n)]
    for recurrent in (*sets, *reversed(sets)):
        kl, losses = whole(models, recurrent)
        found = swaps.figures(recurrent)
        assert found.kl == pytest.approx(kl, rel=1e-4, abs=1e-5)
        assert found.probes["copying"].loss == pytest.approx(losses, rel=1e-4)
    own = swaps.teacher_figures
    assert own.kl == [0, 0, 0] and len(own.probes["copying"].acc) == 2


def test_neighbours_of_a_set_start_at_their_difference(models):
    swaps = Swaps(*models, WINDOWS, PROBES)
    neighbours = [frozenset({1}) ^ {layer} for layer in range(4)]
    apart = [swaps.figures(recurrent) for recurrent in neighbours]
    tokens_run = swaps.states.tokens_run
    assert swaps.measure(neighbours) == apart  # to the bit, whatever the base
    n = WINDOWS[:, :-1].numel() + PROBES[0].ids.numel()
    assert swaps.states.tokens_run - tokens_run == n * (2 + 4 + 3 + 2 + 1)  # the base from layer 1, and its neighbours


def test_the_base_of_neighbours():
    assert common_base([frozenset({1, 2}), frozenset({1, 3}), frozenset({1, 2, 3})]) == {1, 2, 3}
    assert common_base([frozenset({4}) ^ {i} for i in range(5)]) == {4}
    assert common_base([frozenset()]) == frozenset()


def test_what_equals_the_teachers_is_held_once(models):
    teacher, student = models[0], copy.deepcopy(models[1]).requires_grad_(False)
    copied = teacher.model.layers[2].input_layernorm.weight
    student.backbone.layers[2].input_layernorm.weight.data.copy_(copied)
    before = student(WINDOWS).logits
    assert share_models(student, teacher) == copied.nbytes
    assert student.backbone.layers[2].input_layernorm.weight is copied
    assert torch.equal(student(WINDOWS).logits, before) and share_models(student, teacher) == 0
