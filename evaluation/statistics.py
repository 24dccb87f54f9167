"""Statistics of predictions: accuracies and standard errors by subject and group, as lm-evaluation-harness computes
them, and tests whether two models that answered the same questions differ.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from evaluation.mmlu import GROUP_NAMES, GROUP_OF, Prediction

Z = 1.959964  # 95% of a standard normal distribution lie within +-Z


def aggregate(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Returns `acc`, `stderr` and `n` of all questions, and the same by name under `groups` and `subjects`. All
    questions count alike: larger subjects weigh more in their group. Subjects that MMLU lacks are in no group.
    """
    assert predictions, "nothing to aggregate"
    return {**_score(predictions), **_by_part(_score, predictions)}


def _score(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Returns accuracy and standard error. The error is that of a mean over questions from k subjects, from the
    variance within subjects, as lm-eval pools it for a group; for one subject it is the usual one. It is None where
    every subject has one question.
    """
    hits: dict[str, list[bool]] = {}
    for prediction in predictions:
        hits.setdefault(prediction.subject, []).append(is_right(prediction))
    n, k = len(predictions), len(hits)
    squares = sum(sum(right) * (1 - sum(right) / len(right)) for right in hits.values())
    return {
        "acc": sum(map(sum, hits.values())) / n,
        "stderr": math.sqrt(squares / (n - k) / n) if n > k else None,
        "n": n,
    }


def is_right(prediction: Prediction) -> bool:
    """Returns whether the predicted letter is the answer."""
    return prediction.prediction == prediction.answer


def compare(first: Sequence[Prediction], second: Sequence[Prediction]) -> dict[str, Any]:
    """Returns how much more often the second model is right than the first, on the same questions in the same order:
    `diff`, `low` and `high` (95%), McNemar's `p`, the number of questions `gained` and `lost`; the same by name under
    `groups` and `subjects`.
    """
    pairs = list(zip(first, second, strict=True))
    assert all((a.subject, a.index) == (b.subject, b.index) for a, b in pairs)
    return {**_difference(pairs), **_by_part(_difference, pairs)}


def _difference(pairs: Sequence[tuple[Prediction, Prediction]]) -> dict[str, Any]:
    n = len(pairs)
    gained = sum(is_right(b) and not is_right(a) for a, b in pairs)
    lost = sum(is_right(a) and not is_right(b) for a, b in pairs)
    low, high = paired_interval(gained, lost, n)
    p = mcnemar(gained, lost)
    return {"diff": (gained - lost) / n, "low": low, "high": high, "p": p, "gained": gained, "lost": lost, "n": n}


def paired_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """Returns the 95% interval of a difference of paired proportions: the usual (Wald) interval after half a question
    has been added to each of the four cells, so that it holds for few questions too (Agresti and Min, Statistics in
    Medicine 24, 2005).
    """
    gained_, lost_, n_ = gained + 0.5, lost + 0.5, n + 2
    diff = (gained_ - lost_) / n_
    half = Z * math.sqrt(gained_ + lost_ - (gained_ - lost_) ** 2 / n_) / n_
    return max(diff - half, -1.0), min(diff + half, 1.0)


def mcnemar(gained: int, lost: int) -> float:
    """Returns the two-sided exact p-value: the probability of a split at least as uneven between two models that are
    equally good (McNemar, Psychometrika 12, 1947; the binomial test).
    """
    n, fewer = gained + lost, min(gained, lost)
    tail, term = 0, 1
    for k in range(fewer + 1):
        tail += term
        term = term * (n - k) // (k + 1)  # n over k + 1
    return min(1.0, 2 * tail / 2**n)


def _by_part(summary: Callable[[Sequence[Any]], dict[str, Any]], items: Sequence[Any]) -> dict[str, Any]:
    """Applies `summary` to the predictions, or pairs of them, of each group and each subject."""
    subjects: dict[str, list[Any]] = {}
    groups: dict[str, list[Any]] = {}
    for item in items:
        subject = (item[0] if isinstance(item, tuple) else item).subject
        subjects.setdefault(subject, []).append(item)
        if subject in GROUP_OF:
            groups.setdefault(GROUP_OF[subject], []).append(item)
    return {
        "groups": {name: summary(groups[name]) for name in GROUP_NAMES if name in groups},
        "subjects": {name: summary(members) for name, members in subjects.items()},
    }
