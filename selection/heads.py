"""Which heads are kept in layers that are not whole: those without which the probes lose most, or, by a search, those
that have to look far, with what is left of the probes with fewer and fewer of them. Heads that share a key/value head
are kept together.
"""

import logging
from collections.abc import Sequence
from typing import Any

from selection.ablation import mean_growth
from selection.dealing import Dealt
from selection.material import Material
from selection.probes import estimates
from selection.reach import FIRST, LAST, Far, Group, ShortSighted, thinned_out
from selection.swaps import Figures

logger = logging.getLogger("train")

CHOOSING, ASIDE = "heads", "heads_aside"  # what names of rows begin with


def shapes_of_heads(choosing: Material, aside: Material) -> dict[str, tuple[int, dict[str, int]]]:
    """Returns how many windows and texts of each probe the rows have, by what their names begin with."""
    return {CHOOSING: (0, choosing.shape[1]), ASIDE: (0, aside.shape[1])}


def strongest_heads(rows: Sequence[dict[str, Any]], n_heads: int, whole: Sequence[int], size: int) -> dict[str, Any]:
    """Returns the heads of the key/value heads whose query heads the probes miss most, by the sums of their scores.

    rows: of the ablated heads, each with its `place` and `score`. size: query heads of a key/value head.
    """
    sums: dict[Group, float] = {}
    for row in rows:
        layer, head = row["place"]
        if layer not in whole:
            sums[layer, head // size] = sums.get((layer, head // size), 0.0) + row["score"]
    groups = sorted(sorted(sums, key=lambda group: (-sums[group], group))[: n_heads // size])
    names = [f"{layer}:{group * size + i}" for layer, group in groups for i in range(size)]
    return {"names": names, "whole": list(whole), "sets": []}


def find_heads(teacher: Any, n_heads: int, whole: Sequence[int], dealt: Dealt, material: Material) -> dict[str, Any]:
    """Returns the heads that have to look far, as `names`, and the figures of all sets on the way, as JSON has them.

    n_heads: a multiple of the query heads of a key/value head. whole: layers that are kept anyway, and see far.
    """
    choosing = ShortSighted(teacher, material.part(False).probes)
    fixed = frozenset(choosing.groups_of(whole))
    others = choosing.groups_of(layer for layer in range(choosing.n_layers) if layer not in whole)
    n_groups = n_heads // choosing.per_group
    logger.info("searching %d of %d key/value heads of the teacher that have to look far", n_groups, len(others))
    own = dealt.ranks.share(choosing.scores(fixed.union(others)))[0]

    def losses(far: Far, some: Sequence[Group]) -> list[float]:
        logger.info("%d key/value heads are left", len(far))
        rows = _measured(CHOOSING, dealt, choosing, [fixed | far - {group} for group in some], fixed | far)
        return [mean_growth(row.probes, own) for row in rows]

    path = thinned_out(others, n_groups, losses)
    del choosing.states
    aside = ShortSighted(teacher, material.part(True).probes)
    sets = [*path, frozenset[Group]()]  # the last shows what those that are kept are worth
    rows = [_measured(ASIDE, dealt, aside, [fixed | far], fixed | far)[0] for far in sets]
    names = [["{}:{}".format(*head) for head in aside.heads_of(far)] for far in sets]
    return {
        "names": names[-2],
        "whole": list(whole),
        "first": FIRST,
        "last": LAST,
        "sets": [
            {"n_groups": len(far), "heads": heads, "probes": estimates(row.probes)}
            for far, heads, row in zip(sets, names, rows, strict=True)
        ],
    }


def _measured(kind: str, dealt: Dealt, teacher: ShortSighted, sets: Sequence[Far], base: Far) -> list[Figures]:
    """Returns the figures of sets that differ from a base in one group each, at most."""
    names = [f"{kind} {','.join('{}:{}'.format(*group) for group in sorted(far))}" for far in sets]
    if any(name not in dealt.rows for name in names):
        teacher.prepare(base)
    return dealt(names, lambda i: Figures([], teacher.scores(sets[i])))
