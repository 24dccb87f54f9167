"""Which layers are recurrent, by search: one layer after another becomes recurrent, or is given back to the teacher,
each time the one whose set measures best. Layers act together, so that what a layer changes is measured anew in each
round, from the most promising on; ranking layers by their single swaps is there to compare with.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from selection.swaps import Figures, Recurrent

F = TypeVar("F")
Direction = Literal["keep", "recur"]  # from all layers recurrent, or from none
AT_ONCE = 4  # sets: a turn of several ranks; the same for any number of them, so that the choice is


@dataclass(frozen=True)
class Step(Generic[F]):
    """Holds a set of recurrent layers, its figures and its value: the smaller, the better."""

    recurrent: Recurrent
    figures: F
    value: float


@dataclass(frozen=True)
class Objective:
    """Weighs the figures of a hybrid: KL + weight * growth of the probes' loss over the teacher's, never below 0."""

    teacher: Figures
    weight: float

    def kl(self, figures: Figures) -> float:
        """Returns the mean KL over windows."""
        return _mean(figures.kl)

    def growth(self, figures: Figures) -> float:
        """Returns how much larger than the teacher's the loss of a probe is, in nats: 0 if it is not; the mean over
        probes of the means over their texts, and 0 without probes.
        """
        own = self.teacher.probes
        return _mean([max(0.0, _mean(figures.probes[name].loss) - _mean(own[name].loss)) for name in own])

    def __call__(self, figures: Figures) -> float:
        return self.kl(figures) + self.weight * self.growth(figures)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def greedy(
    n_layers: int,
    measure: Callable[[Sequence[Recurrent]], Sequence[F]],
    value: Callable[[F], float],
    n_kept: int,
    direction: Direction,
) -> list[Step[F]]:
    """Returns the sets on the way to `n_kept` of the teacher's layers, the start first. The last is the chosen one.

    A round measures layers in the order of what each changed when it was last measured, `AT_ONCE` at a time, until none
    of the rest was as good as the best of this round is now. Where layers cost the more, the fewer of the teacher's are
    left, that is the layer a full round finds (lazy greedy: Minoux 1978); a hybrid's do, but for noise and spares.

    measure: figures of sets of recurrent layers, given those that can be measured at once.
    """
    assert 0 <= n_kept <= n_layers
    every = frozenset(range(n_layers))
    current: Recurrent = every if direction == "keep" else frozenset()
    path = [Step(current, figures, value(figures)) for figures in measure([current])]
    change = dict.fromkeys(sorted(every), -math.inf)  # of the value, by a layer, when it was last measured
    while len(every - current) != n_kept:
        movable = current if direction == "keep" else every - current
        waiting = sorted(movable, key=lambda layer: (change[layer], layer))
        found: dict[int, Step[F]] = {}
        best = math.inf
        while waiting and change[waiting[0]] < best:
            turn, waiting = waiting[:AT_ONCE], waiting[AT_ONCE:]
            sets = [current ^ {layer} for layer in turn]
            for layer, one, figures in zip(turn, sets, measure(sets), strict=True):
                found[layer] = Step(one, figures, value(figures))
                change[layer] = found[layer].value - path[-1].value
            best = min(change[layer] for layer in found)
        path.append(found[min(found, key=lambda layer: (found[layer].value, layer))])
        current = path[-1].recurrent
    return path


def ranked(singles: Sequence[float], n_kept: int) -> Recurrent:
    """Returns the layers that are recurrent by ranking: those whose single swaps have the lowest values."""
    order = sorted(range(len(singles)), key=lambda layer: (singles[layer], layer))
    return frozenset(order[: len(singles) - n_kept])


def pareto(points: Sequence[tuple[float, ...]]) -> list[int]:
    """Returns the indices of the points that no other is at least as good as in all coordinates and better in one. Of
    equal points the first.
    """

    def is_beaten(i: int) -> bool:
        own = points[i]
        return any(
            all(a <= b for a, b in zip(other, own, strict=True)) and (other != own or j < i)
            for j, other in enumerate(points)
            if j != i
        )

    return [i for i in range(len(points)) if not is_beaten(i)]
