"""The search on objectives whose best sets are known."""

import itertools
import random

import pytest

from selection.greedy import Objective, greedy, pareto, ranked
from selection.probes import Score
from selection.swaps import Figures


def search(value, n_kept, direction, n_layers=6):
    measured = []

    def measure(sets):
        measured.extend(sets)
        return [value(recurrent) for recurrent in sets]

    return greedy(n_layers, measure, float, n_kept, direction), measured


@pytest.mark.parametrize("direction", ["keep", "recur"])
@pytest.mark.parametrize("seed", range(5))
def test_where_costs_add_up_it_finds_the_best_set(direction, seed):
    dice = random.Random(seed)
    costs = [dice.random() for _ in range(6)]
    for n_kept in range(7):
        path, measured = search(lambda some: sum(costs[i] for i in some), n_kept, direction)
        best = min(itertools.combinations(range(6), 6 - n_kept), key=lambda some: sum(costs[i] for i in some))
        assert path[-1].recurrent == set(best) == ranked(costs, n_kept)
        n_rounds = len(path) - 1
        assert n_rounds == (n_kept if direction == "keep" else 6 - n_kept)
        assert len(measured) <= 1 + sum(6 - done for done in range(n_rounds))  # and nothing behind the budget


@pytest.mark.parametrize("direction", ["keep", "recur"])
def test_a_round_measures_only_layers_that_can_win_it(direction):
    """Costs that grow with the square of what is recurrent: as in a hybrid, a layer costs the more, the fewer are kept.
    Giving one back then gains the less, the more are: both directions find what full rounds find, from fewer sets.
    """
    dice = random.Random(0)
    costs = [dice.random() for _ in range(20)]

    def value(recurrent):
        return sum(costs[i] for i in recurrent) ** 2

    path, measured = search(value, 10, direction, 20)
    current = path[0].recurrent
    for step in path[1:]:
        movable = current if direction == "keep" else set(range(20)) - current
        current = min((current ^ {layer} for layer in movable), key=value)
        assert step.recurrent == current
    assert len(measured) < 1 + 20 + 9 * 10


def test_layers_that_only_matter_together_are_seen_by_measuring_again():
    """Layers 0 and 1 are each other's spare: singly they cost nothing, together all."""

    def value(recurrent):
        return 10 * ({0, 1} <= recurrent) + sum(0.1 for layer in recurrent if layer > 1)

    singles = [value({layer}) for layer in range(6)]
    assert value(ranked(singles, 4)) >= 10
    assert all(value(search(value, 4, direction)[0][-1].recurrent) < 1 for direction in ("keep", "recur"))


def test_of_equals_the_first_layer_is_taken():
    assert [sorted(step.recurrent) for step in search(lambda some: 0, 3, "keep", 4)[0]] == [
        [0, 1, 2, 3], [1, 2, 3], [2, 3], [3],
    ]  # fmt: skip


def figures(kl, copying, retrieval):
    return Figures(kl, {"copying": Score(copying, []), "retrieval": Score(retrieval, [])})


def test_the_objective_is_the_stated_mix():
    objective = Objective(figures([0, 0], [2, 4], [1]), 0.3)
    assert objective(figures([0.1, 0.3], [3, 5], [1.5])) == pytest.approx(0.2 + 0.3 * (1 + 0.5) / 2)
    # a probe that the hybrid does better than the teacher earns nothing
    assert objective(figures([0.1, 0.3], [0, 0], [1.5])) == pytest.approx(0.2 + 0.3 * 0.5 / 2)
    assert Objective(Figures([0.0], {}), 0.3)(Figures([0.5], {})) == 0.5


def test_what_no_other_beats_is_kept():
    points = [(1, 5), (2, 2), (3, 3), (2, 2), (5, 1), (1, 6)]
    assert pareto(points) == [0, 1, 4]
    assert pareto([]) == []
