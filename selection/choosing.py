"""A choice from beginning to end: which probes the teacher can do, what its heads do for them, what each of the
student's layers costs in its place, sets by both directions of the search, and their figures on texts kept aside; then
which heads of the other layers have to look far. The ranks measure one set or ablation each at a time; what is chosen
does not depend on how many they are.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamba import LlambaForCausalLM
from processes.ranks import Ranks
from selection.ablation import Ablations, growth, mean_growth
from selection.dealing import Dealt, check_finite
from selection.greedy import Direction, Objective, Step, greedy, pareto, ranked
from selection.heads import find_heads, shapes_of_heads, strongest_heads
from selection.material import Material, no_probe, usable
from selection.measurements import name_of
from selection.probes import Score, estimates
from selection.reach import heads_per_group
from selection.statistics import estimate
from selection.swaps import Figures, Recurrent, Swaps

logger = logging.getLogger("train")

DIRECTIONS: tuple[Direction, ...] = ("keep", "recur")


@dataclass(frozen=True)
class Request:
    """Says what is to be chosen, and on what."""

    material: Material
    n_kept: int  # whole layers; 0: none are chosen
    probe_weight: float
    ablates: bool = True
    n_heads: int = 0  # of layers that are not whole
    searches_heads: bool = False  # for those that have to look far; else they are the strongest when ablated
    whole: tuple[int, ...] = ()  # layers that are whole, where none are chosen
    directions: tuple[Direction, ...] = DIRECTIONS


def choose(
    teacher: Any, student: LlambaForCausalLM, request: Request, ranks: Ranks, path: Path | None = None
) -> dict[str, Any]:
    """Returns the layers that are kept, and all that was found on the way, as JSON has it. path: of measured.jsonl.
    Raises ValueError.
    """
    dealt, material, found = _begin(teacher, request, ranks, path)
    found |= {"n_kept": request.n_kept, "probe_weight": request.probe_weight}
    choosing, aside = material.part(False), material.part(True)
    swaps = Swaps(teacher, student, choosing.windows, choosing.probes)
    objective = Objective(_of_teacher(swaps, ranks), request.probe_weight)
    found |= _search(dealt.sets("choosing", swaps), objective, swaps.n_layers, request)
    del swaps
    swaps = Swaps(teacher, student, aside.windows, aside.probes)
    found |= _last_figures(dealt.sets("aside", swaps), _of_teacher(swaps, ranks), request, found)
    del swaps
    return _with_heads(found, teacher, dataclasses.replace(request, whole=tuple(found["layers"])), dealt, material)


def choose_heads(teacher: Any, request: Request, ranks: Ranks, path: Path | None = None) -> dict[str, Any]:
    """Returns which heads are kept beside the request's whole layers, as `choose` does, and chooses no layers. Raises
    ValueError.
    """
    dealt, material, found = _begin(teacher, request, ranks, path)
    found |= {"n_kept": 0, "n_layers": teacher.config.num_hidden_layers, "layers": list(request.whole)}
    return _with_heads(found, teacher, request, dealt, material)


def _with_heads(
    found: dict[str, Any], teacher: Any, request: Request, dealt: Dealt, material: Material
) -> dict[str, Any]:
    """Returns what was found with the heads that are kept, None if none were asked for. The last thing measured."""
    found["heads"] = None
    if request.n_heads and request.searches_heads:
        found["heads"] = find_heads(teacher, request.n_heads, request.whole, dealt, material)
    elif request.n_heads:
        rows = found["ablation"]["heads"]
        found["heads"] = strongest_heads(rows, request.n_heads, request.whole, heads_per_group(teacher.config))
    dealt.rows.close()
    return found


def _begin(teacher: Any, request: Request, ranks: Ranks, path: Path | None) -> tuple[Dealt, Material, dict[str, Any]]:
    """Returns what deals, the texts without probes that the teacher cannot do, and what ablations have found."""
    ablations = Ablations(teacher, request.material.part(False).probes)
    own = ranks.share(ablations.teacher_scores)[0]
    material = usable(request.material, own)
    choosing, aside = material.part(False), material.part(True)
    for name, reason in material.left_out.items():
        logger.warning("the probe %s is left out: %s", name, reason)
    if not choosing.probes and request.n_heads:
        raise ValueError(no_probe(material.left_out))
    if not choosing.probes and request.probe_weight:
        logger.warning("no probe could be used: layers are chosen by the KL alone, which hardly sees copying")
    shapes = {"ablation": (0, choosing.shape[1]), "choosing": choosing.shape, "aside": aside.shape}
    shapes |= shapes_of_heads(choosing, aside)
    dealt = Dealt(ranks, path, shapes)
    found: dict[str, Any] = {"left_out": material.left_out, "ablation": None}
    found["teacher"] = {"probes": estimates({probe.name: own[probe.name] for probe in material.probes})}
    if request.ablates and choosing.probes:
        if len(choosing.probes) < len(request.material.probes):
            ablations = Ablations(teacher, choosing.probes)
        found["ablation"] = _ablate(dealt, ablations)
    return dealt, material, found


def _of_teacher(swaps: Swaps, ranks: Ranks) -> Figures:
    """Returns the teacher's figures, the same on all ranks. Raises ValueError if they are not finite: a hybrid compared
    with NaN would seem to lose nothing.
    """
    figures = ranks.share(swaps.teacher_figures)[0]
    check_finite("the teacher", figures)
    return figures


def _ablate(dealt: Dealt, ablations: Ablations) -> dict[str, Any]:
    """Returns the scores of each layer and each head of the teacher."""
    own = dealt.ranks.share(ablations.teacher_scores)[0]
    places: list[tuple[int, ...]] = [(layer,) for layer in range(ablations.n_layers)]
    places += [(layer, head) for (layer,) in places for head in range(ablations.n_heads)]

    def measure(i: int) -> Figures:
        layer, *heads = places[i]
        return Figures([], ablations.without(layer, heads or None))

    logger.info("ablating %d heads and %d layers of the teacher", len(places) - ablations.n_layers, ablations.n_layers)
    rows = dealt([name_of("ablation", place) for place in places], measure)
    scored = [_ablation_row(place, row.probes, own) for place, row in zip(places, rows, strict=True)]
    return {"layers": scored[: ablations.n_layers], "heads": scored[ablations.n_layers :]}


def _ablation_row(place: tuple[int, ...], scores: dict[str, Score], own: dict[str, Score]) -> dict[str, Any]:
    probes = {}
    for name, teacher in own.items():
        drop = [a - b for a, b in zip(teacher.acc, scores[name].acc, strict=True)]
        growths = growth(scores[name], teacher)
        probes[name] = {"growth": estimate(growths)._asdict(), "acc_drop": estimate(drop)._asdict()}
    return {"place": list(place), "score": mean_growth(scores, own), "probes": probes}


def _search(
    measure: Callable[[Sequence[Recurrent]], list[Figures]], objective: Objective, n_layers: int, request: Request
) -> dict[str, Any]:
    """Returns the single swaps, all sets on the way to the chosen one, and that one."""
    n_kept = request.n_kept
    seen: dict[Recurrent, Figures] = {}

    def noted(sets: Sequence[Recurrent]) -> list[Figures]:
        found = measure(sets)
        seen.update(zip(sets, found, strict=True))
        return found

    singles = [
        Step(frozenset({layer}), figures, objective(figures))
        for layer, figures in enumerate(noted([frozenset({layer}) for layer in range(n_layers)]))
    ]
    logger.info("single swaps measured: %d layers", n_layers)
    steps: list[tuple[str, Step[Figures]]] = []
    for direction in request.directions:
        path = greedy(n_layers, noted, objective, n_kept, direction)
        steps += [(direction, step) for step in path]
        kept = _kept(path[-1].recurrent, n_layers)
        logger.info("%s: %d sets, %s keeps layers %s", direction, len(path), f"{path[-1].value:.3f}", kept)
    others = {"ranking": ranked([step.value for step in singles], n_kept), "evenly": evenly(n_layers, n_kept)}
    for by, recurrent in others.items():
        figures = noted([recurrent])[0]
        steps.append((by, Step(recurrent, figures, objective(figures))))
    last = {by: step for by, step in steps if len(step.recurrent) == n_layers - n_kept}
    chosen = min(last, key=lambda by: last[by].value)
    return {
        "n_layers": n_layers,
        "layers": _kept(last[chosen].recurrent, n_layers),
        "chosen_by": chosen,
        "teacher": _summary(objective.teacher),
        "swaps": [{"layer": layer, **_row(step, n_layers)} for layer, step in enumerate(singles)],
        "sets": [{"by": by, **_row(step, n_layers)} for by, step in steps],
        "pareto": _pareto(seen, objective, n_layers, n_kept),
    }


def _pareto(
    seen: Mapping[Recurrent, Figures], objective: Objective, n_layers: int, n_kept: int
) -> list[dict[str, Any]]:
    """Returns of all measured sets of the budget's size those that no other beats in both KL and probes."""
    steps = [Step(one, found, objective(found)) for one, found in seen.items() if len(one) == n_layers - n_kept]
    best = pareto([(objective.kl(step.figures), objective.growth(step.figures)) for step in steps])
    rows = [{**_row(steps[i], n_layers), "growth": objective.growth(steps[i].figures)} for i in best]
    return sorted(rows, key=lambda row: row["kl"]["mean"])


def _last_figures(
    measure: Callable[[Sequence[Recurrent]], list[Figures]], teacher: Figures, request: Request, found: dict[str, Any]
) -> dict[str, Any]:
    """Returns the figures of the sets of the budget's size on the texts that were kept aside."""
    objective, every = Objective(teacher, request.probe_weight), frozenset(range(found["n_layers"]))
    ends = [one for one in found["sets"] if len(one["kept"]) == request.n_kept]
    sets = [every - set(one["kept"]) for one in ends]
    rows = [
        {"by": one["by"], **_row(Step(recurrent, figures, objective(figures)), found["n_layers"])}
        for one, recurrent, figures in zip(ends, sets, measure(sets), strict=True)
    ]
    return {"aside": {"teacher": _summary(teacher), "sets": rows}}


def evenly(n_layers: int, n_kept: int) -> Recurrent:
    """Returns the recurrent layers of a hybrid that keeps layers at equal distances."""
    return frozenset(range(n_layers)) - {(2 * i + 1) * n_layers // (2 * n_kept) for i in range(n_kept)}


def _kept(recurrent: Recurrent, n_layers: int) -> list[int]:
    return [layer for layer in range(n_layers) if layer not in recurrent]


def _row(step: Step[Figures], n_layers: int) -> dict[str, Any]:
    return {"kept": _kept(step.recurrent, n_layers), "value": step.value, **_summary(step.figures)}


def _summary(figures: Figures) -> dict[str, Any]:
    """Returns means and intervals: of the KL over windows, of a probe's loss and accuracy over its texts."""
    return {"kl": estimate(figures.kl)._asdict(), "probes": estimates(figures.probes)}
