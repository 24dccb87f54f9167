"""Which single option, or setting of NCCL, would make a run faster, and by how much."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from arguments import TrainArguments
from preflight.footprint import Footprint
from preflight.machine import Machine
from preflight.plan import RECOMPUTE, Change, Plan, make_plan
from preflight.transport import HOST_MEMORY, NO_SHM, RATES, SOCKETS, Link, way_inside

MOST_ACCUMULATED = 16
WORTH = 1.05  # times as fast; less is not worth a change
NOT_ON_NCCL = "it has not run on NCCL yet"
NOT_LEARNED = "these weights then do not learn"
# Options that save work or traffic, and what else they change.
PRICES = {
    "--teacher_signal hidden": "",
    f"--no_{RECOMPUTE[2:]}": "",
    "--freeze_mlp": NOT_LEARNED,
    "--freeze_replaced_layers": NOT_LEARNED,
}


class Speedup(NamedTuple):
    """Holds a change, as text, how many times as fast the run is with it, and what else it changes, if anything."""

    change: str
    factor: float
    price: str = ""


def faster_options(args: TrainArguments) -> Iterator[tuple[str, TrainArguments]]:
    """Yields a change of options that may save time and costs memory: as text, and the options with it."""
    if args.stage == "distil" and args.gradient_checkpointing:
        yield f"--no_{RECOMPUTE[2:]}", dataclasses.replace(args, gradient_checkpointing=False, checkpoint_blocks=None)


def best_of(found: Iterable[Speedup]) -> list[Speedup]:
    """Returns the change that helps most, if any is worth it; and if that changes what is learned, the best of those
    that do not after it.
    """
    ranking = sorted((one for one in found if one.factor >= WORTH), key=lambda one: -one.factor)
    free = [one for one in ranking if not one.price]
    return [ranking[0], *free[:1]] if ranking and ranking[0].price else ranking[:1]


def speedups(
    args: TrainArguments, footprint: Footprint, machine: Machine, plans: list[Plan], changes: Iterable[Change]
) -> Iterator[Speedup]:
    """Yields what each change would bring. plans: the run's, and those with the teacher elsewhere; changes: others of
    its options.
    """
    plan, *others = plans

    def faster(change: str, changed: Plan, price: str = "") -> Speedup:
        return Speedup(change, changed.tokens_per_second / plan.tokens_per_second, price)

    for other in others:
        if other.fits(machine):
            yield faster(f"--teacher_placement {other.placement}", other)
    if plan.n_students > 1 and machine.n_nodes == 1 and way_inside() == SOCKETS:
        link = Link(max(RATES[HOST_MEMORY], machine.link.rate), "")
        changed = make_plan(args, footprint, dataclasses.replace(machine, link=link), plan.placement)
        yield faster(f"unset {NO_SHM} (doctor.py --collectives says more)", changed)
    if plan.placement == "dedicated" and args.teacher_prefetch == 0:
        ahead = dataclasses.replace(args, teacher_prefetch=1)
        yield faster("--teacher_prefetch 1", make_plan(ahead, footprint, machine, plan.placement))
    if args.gradient_exchange == "allreduce" and plan.n_ranks > 1:
        owners = dataclasses.replace(args, gradient_exchange="owners")
        changed = make_plan(owners, footprint, machine, plan.placement)
        if changed.fits(machine) or not plan.fits(machine):
            yield faster("--gradient_exchange owners", changed, NOT_ON_NCCL)
    if args.grad_accumulation_steps < MOST_ACCUMULATED:
        more = dataclasses.replace(args, grad_accumulation_steps=MOST_ACCUMULATED)
        changed = make_plan(more, footprint, machine, plan.placement)
        if changed.fits(machine) or not plan.fits(machine):
            price = f"a step then learns from {changed.tokens:,} tokens"
            yield faster(f"--grad_accumulation_steps {MOST_ACCUMULATED}", changed, price)
    for change, options, its_footprint in changes:
        changed = make_plan(options, its_footprint, machine, plan.placement)
        if change in PRICES and (changed.fits(machine) or not plan.fits(machine)):
            yield faster(change, changed, PRICES[change])
