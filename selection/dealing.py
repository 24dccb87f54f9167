"""Deals what a choice has to measure to the ranks, and keeps what was measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from processes.ranks import Ranks
from selection.measurements import FILE, Measured, name_of
from selection.swaps import Figures, Recurrent, Swaps


class Dealt:
    """Deals what has to be measured to the ranks, and has all results on each of them. The main rank writes them."""

    def __init__(self, ranks: Ranks, path: Path | None, shapes: Mapping[str, tuple[int, Mapping[str, int]]]) -> None:
        self.ranks = ranks
        self.rows = Measured(path if ranks.is_main else None, shapes)
        self.rows.rows = ranks.share(self.rows.rows)[0]

    def __call__(self, names: Sequence[str], measure: Callable[[int], Figures]) -> list[Figures]:
        """Returns the figures of some names, of which those are measured, by their index, that have none."""
        missing = [names.index(name) for name in dict.fromkeys(names) if name not in self.rows]
        for start in range(0, len(missing), self.ranks.world_size):
            turn = missing[start : start + self.ranks.world_size]
            own = measure(turn[self.ranks.rank]) if self.ranks.rank < len(turn) else None
            for i, figures in zip(turn, self.ranks.share(own), strict=False):
                check_finite(f"{names[i]!r} of {FILE}", figures)
                self.rows.put(names[i], figures)
        return [self.rows[name] for name in names]

    def sets(self, kind: str, swaps: Swaps) -> Callable[[Sequence[Recurrent]], list[Figures]]:
        """Returns what measures sets of recurrent layers. kind: "choosing" or "aside", the texts of `swaps`."""

        def measure(sets: Sequence[Recurrent]) -> list[Figures]:
            names = [name_of(kind, sorted(one)) for one in sets]
            swaps.prepare([one for one, name in zip(sets, names, strict=True) if name not in self.rows])
            return self(names, lambda i: swaps.figures(sets[i]))

        return measure


def check_finite(what: str, figures: Figures) -> None:
    values = [*figures.kl, *(x for score in figures.probes.values() for x in (*score.loss, *score.acc))]
    if not all(map(math.isfinite, values)):
        raise ValueError(f"the figures of {what} are not finite; use --dtype float32 or bfloat16, or other models")
