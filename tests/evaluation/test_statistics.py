"""Accuracies, errors and differences against sums made by hand, scipy and simulation."""

import math
import random

import pytest

from evaluation.mmlu import Prediction
from evaluation.statistics import aggregate, compare, mcnemar, paired_interval


def predictions_of(subject: str, pairs: list[str]) -> list[Prediction]:
    """Makes predictions from pairs: the right letter and the model's."""
    return [Prediction(subject, i, answer, prediction, (-1.0,) * 4) for i, (answer, prediction) in enumerate(pairs)]


def test_aggregate_by_hand():
    results = predictions_of("astronomy", ["AA", "BA", "CC"]) + predictions_of("virology", ["DD", "AB"])
    results += predictions_of("anatomy", ["AA"]) + predictions_of("no_mmlu_subject", ["AB"])
    found = aggregate(results)
    assert (found["acc"], found["n"]) == (4 / 7, 7)  # over questions, not the mean of the subjects' accuracies
    assert found["stderr"] == pytest.approx(math.sqrt((3 * 2 / 9 + 2 * 1 / 4) / (7 - 4) / 7))
    assert found["subjects"]["astronomy"] == {"acc": 2 / 3, "stderr": pytest.approx(math.sqrt(2 / 9 / 2)), "n": 3}
    assert found["subjects"]["anatomy"] == {"acc": 1.0, "stderr": None, "n": 1}
    assert list(found["groups"]) == ["stem", "other"]  # MMLU's order
    assert (found["groups"]["stem"]["acc"], found["groups"]["stem"]["n"]) == (3 / 4, 4)
    assert found["groups"]["other"] == found["subjects"]["virology"]
    assert list(found["subjects"]) == ["astronomy", "virology", "anatomy", "no_mmlu_subject"]


def test_compare_by_hand():
    first = predictions_of("astronomy", ["AA", "BA", "CC", "DD"]) + predictions_of("virology", ["AB"])
    second = predictions_of("astronomy", ["AA", "BB", "CC", "DA"]) + predictions_of("virology", ["AA"])
    found = compare(first, second)
    assert {key: found[key] for key in ("diff", "gained", "lost", "n", "p")} == {
        "diff": 0.2,
        "gained": 2,
        "lost": 1,
        "n": 5,
        "p": 1.0,
    }
    assert (found["subjects"]["astronomy"]["diff"], found["subjects"]["virology"]["diff"]) == (0.0, 1.0)
    assert found["groups"]["other"] == found["subjects"]["virology"]
    opposite = compare(second, first)
    assert (opposite["diff"], opposite["low"], opposite["high"]) == (-0.2, -found["high"], -found["low"])
    assert opposite["p"] == found["p"]


def test_only_the_same_questions_are_compared():
    questions = predictions_of("astronomy", ["AA", "BB"])
    with pytest.raises(AssertionError):
        compare(questions, questions[::-1])
    with pytest.raises(ValueError, match="shorter"):
        compare(questions, questions[:1])


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (0, 9), (5, 5), (3, 11), (300, 240), (2500, 2000)])
def test_mcnemar_is_the_binomial_test(gained, lost):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


def test_an_interval_has_a_width_where_nothing_differed_and_stays_within_what_is_possible():
    low, high = paired_interval(0, 0, 20)
    assert -0.2 < low < 0 < high < 0.2 and low == -high
    assert paired_interval(3, 0, 3)[1] <= 1 and paired_interval(0, 3, 3)[0] >= -1
    wide, narrow = paired_interval(30, 20, 100), paired_interval(300, 200, 1000)
    assert wide[1] - wide[0] == pytest.approx(math.sqrt(10) * (narrow[1] - narrow[0]), rel=0.05)


@pytest.mark.parametrize("chances", [(0.2, 0.1), (0.05, 0.05), (0.02, 0.1)])
def test_an_interval_holds_the_truth_as_often_as_it_says(chances):
    dice, held, trials, n = random.Random(0), 0, 2000, 60
    for _ in range(trials):
        draws = [dice.random() for _ in range(n)]
        gained = sum(draw < chances[0] for draw in draws)
        lost = sum(chances[0] <= draw < sum(chances) for draw in draws)
        low, high = paired_interval(gained, lost, n)
        held += low <= chances[0] - chances[1] <= high
    assert 0.93 < held / trials < 0.985
