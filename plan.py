"""What a run will take, before it takes it: what every GPU holds and whether that fits, how long a step is on paper,
on which GPU the teacher should sit, and what to change where it does not fit. From configs alone, without a GPU:

    python plan.py --gpus 5 --gpu_gb 80 --freeze_mlp --freeze_replaced_layers

takes the options of train_gpus.py besides its own, and prints tables. GB are 10^9 bytes.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from arguments import TrainArguments, parse_train_args
from footprint import Footprint, Items, gradient_bytes, measure_footprint, optimizer_bytes
from utils import run_entry

GB = 1e9
# For the CUDA context and its kernels, the buffers of NCCL and cuBLAS, and the crumbs between blocks. Not computed.
ALLOWANCE = {"CUDA, NCCL (allowance)": int(1.5 * GB)}

RECOMPUTE = "--gradient_checkpointing"

Moments = dict[str, Items]  # what a GPU holds at the largest moment of each phase of a step
Change = tuple[str, TrainArguments, Footprint]  # an option to change, and what the run is then


@dataclass(frozen=True)
class Box:
    """One node: its GPUs, the bytes of each, and the operations per second that matrix products reach on one."""

    n_gpus: int
    gpu_bytes: float
    speed: float


@dataclass(frozen=True)
class Plan:
    """A run with its teacher in one place. gpus: kind of GPU -> moments; seconds are of a micro step."""

    placement: str
    n_students: int
    gpus: dict[str, Moments]
    student_seconds: float
    teacher_seconds: float
    seconds: float
    tokens_per_second: float

    @property
    def largest(self) -> int:
        return max(largest_moment(moments)[1] for moments in self.gpus.values())

    def fits(self, box: Box) -> bool:
        return self.largest <= box.gpu_bytes


# --- one placement -------------------------------------------------------------------------------------------


def asked_placement(args: TrainArguments, box: Box) -> str:
    """Besides `colocated`, and `dedicated` on a GPU of its own: `shared`, one teacher on a student's GPU, and `none`,
    no teacher on any.
    """
    if args.kl_weight == 0 or args.teacher_device == "cpu":
        return "none"
    if args.teacher_device not in (None, f"cuda:{box.n_gpus - 1}"):
        return "shared"
    return args.teacher_placement


def make_plan(args: TrainArguments, footprint: Footprint, box: Box, placement: str) -> Plan:
    n_students = box.n_gpus - 1 if placement == "dedicated" else box.n_gpus
    student_s, teacher_s = sum(footprint.operations.values()) / box.speed, 0.0
    if placement != "none":
        assert footprint.teacher is not None
        teacher_s = footprint.teacher.operations / box.speed * (1 if placement == "colocated" else n_students)
    works_ahead = placement == "dedicated" and args.teacher_prefetch != 0
    seconds = max(student_s, teacher_s) if works_ahead else student_s + teacher_s
    return Plan(
        placement,
        n_students,
        gpu_moments(args, footprint, n_students, placement),
        student_s,
        teacher_s,
        seconds,
        n_students * args.batch_size * args.seq_length / seconds,
    )


def gpu_moments(args: TrainArguments, footprint: Footprint, n_students: int, placement: str) -> dict[str, Moments]:
    student = student_moments(args, footprint, n_students, placement)
    if placement == "colocated":
        return {"every GPU": student}
    if placement == "none":
        return {"student GPU": student}
    assert footprint.teacher is not None
    teacher = {"teacher's weights": footprint.teacher.weights, "teacher's work": footprint.teacher.work}
    if placement == "dedicated":
        return {"student GPU": student, "teacher GPU": {"forward": {**teacher, **ALLOWANCE}}}
    # The teacher works at any moment of the student's; a head on the same device is its own.
    both = {moment: {**items, "teacher's head": 0, **teacher} for moment, items in student.items()}
    return {"student GPU": student, "GPU of student and teacher": both}


def student_moments(args: TrainArguments, footprint: Footprint, n_students: int, placement: str) -> Moments:
    """Of a student's GPU; where its teacher is colocated, with that."""
    state, work = optimizer_bytes(footprint.student, args, n_students)
    gradients = gradient_bytes(footprint.student)
    teacher, colocated = footprint.teacher, placement == "colocated"
    prefetch = 1 if args.teacher_prefetch is None else args.teacher_prefetch
    always = {**footprint.weights, "gradients": gradients, "masters and moments": state}
    if teacher is not None:
        always["teacher's answers"] = teacher.answer * (1 if colocated else 1 + prefetch)
        always |= {"teacher's weights": teacher.weights} if colocated else {"teacher's head": teacher.head}
    always |= ALLOWANCE
    moments = {
        "forward": {**always, **footprint.forward},
        "backward": {**always, **footprint.backward},
        "update": {**always, **footprint.left, "optimizer's work": work},
    }
    if teacher is not None and colocated:  # before the student's forward
        moments = {"teacher": {**always, **footprint.left, "teacher's work": teacher.work}, **moments}
    return moments


def largest_moment(moments: Moments) -> tuple[str, int]:
    totals = {moment: sum(items.values()) for moment, items in moments.items()}
    moment = max(totals, key=totals.__getitem__)
    return moment, totals[moment]


# --- placements against each other, and what to change -------------------------------------------------------


def other_placements(placement: str) -> list[str]:
    return [] if placement == "none" else [name for name in ("dedicated", "colocated") if name != placement]


def alternatives(args: TrainArguments) -> Iterator[tuple[str, TrainArguments]]:
    """Single changes that may save memory, the least costly first."""
    if args.teacher_signal == "logits":
        yield "--teacher_signal hidden", dataclasses.replace(args, teacher_signal="hidden")
    if not args.gradient_checkpointing or args.checkpoint_blocks is not None:
        all_blocks = dataclasses.replace(args, gradient_checkpointing=True, checkpoint_blocks=None)
        yield RECOMPUTE, all_blocks
    if args.batch_size > 1:
        size, accumulate = args.batch_size // 2, args.grad_accumulation_steps * 2
        smaller = dataclasses.replace(args, batch_size=size, grad_accumulation_steps=accumulate)
        yield f"--batch_size {size} --grad_accumulation_steps {accumulate}", smaller
    if not args.freeze_replaced_layers and args.layers:
        yield "--freeze_replaced_layers", dataclasses.replace(args, freeze_replaced_layers=True)
    if not args.freeze_mlp:
        yield "--freeze_mlp", dataclasses.replace(args, freeze_mlp=True)
    if args.dtype == "float32":
        yield "--dtype bfloat16", dataclasses.replace(args, dtype="bfloat16")


def remedies(box: Box, plan: Plan, changes: list[Change]) -> list[tuple[str, Plan]]:
    """Each change with the plan that it leads to; those that save nothing are left out. Where recomputing all blocks
    is enough, the fewest that are come before it.
    """
    found: list[tuple[str, Plan]] = []
    for change, args, footprint in changes:
        changed = make_plan(args, footprint, box, plan.placement)
        if change == RECOMPUTE and changed.fits(box):
            found += fewest_blocks(args, footprint, box, plan, changed)
        if changed.largest < plan.largest:
            found.append((change, changed))
    return found


def fewest_blocks(
    args: TrainArguments, footprint: Footprint, box: Box, plan: Plan, all_blocks: Plan
) -> Iterator[tuple[str, Plan]]:
    """Where it does not take `all_blocks`: as few to recompute as make `plan` fit."""
    n_layer = footprint.student.config.n_layer
    part = (plan.largest - box.gpu_bytes) / (plan.largest - all_blocks.largest)
    for n_blocks in range(math.ceil(n_layer * part), n_layer):
        some = dataclasses.replace(args, checkpoint_blocks=n_blocks)
        changed = make_plan(some, measure_footprint(some), box, plan.placement)
        if changed.fits(box):
            yield f"{RECOMPUTE} --checkpoint_blocks {n_blocks}", changed
            return


# --- on the screen -------------------------------------------------------------------------------------------


def gpu_table(kind: str, moments: Moments, box: Box) -> str:
    """What a GPU holds, an item a line, at the largest moment of each phase."""
    lines = [f"{kind + ', GB':<34}" + "".join(f"{moment:>10}" for moment in moments)]
    for name in dict.fromkeys(name for items in moments.values() for name in items):
        sizes = [items.get(name, 0) for items in moments.values()]
        if any(sizes):
            lines.append(f"  {name:<32}" + "".join(f"{size / GB:>10.3g}" if size else f"{'-':>10}" for size in sizes))
    lines.append(f"  {'all':<32}" + "".join(f"{sum(items.values()) / GB:>10.1f}" for items in moments.values()))
    moment, size = largest_moment(moments)
    spare = (box.gpu_bytes - size) / GB
    verdict = f"fits, {spare:.1f} GB to spare" if spare >= 0 else f"does not fit, {-spare:.1f} GB too much"
    return "\n".join([*lines, f"  {size / GB:.1f} of {box.gpu_bytes / GB:g} GB ({moment}): {verdict}"])


def placement_table(plans: list[Plan], box: Box) -> str:
    titles = ("teacher", "students", "GB at most", "fits", "student, ms", "teacher, ms", "step, ms", "tokens/s")
    rows = [
        (
            plan.placement,
            f"{plan.n_students}",
            f"{plan.largest / GB:.1f}",
            "yes" if plan.fits(box) else "no",
            *(f"{1000 * s:.3g}" for s in (plan.student_seconds, plan.teacher_seconds, plan.seconds)),
            f"{plan.tokens_per_second:,.0f}",
        )
        for plan in plans
    ]
    return "\n".join("".join(f"{cell:>13}" for cell in row) for row in (titles, *rows))


def advice(asked: Plan, others: list[Plan], box: Box) -> str:
    """Which placement to take: the fastest that fits."""
    plans = [asked, *others]
    fastest = max(plans, key=lambda plan: plan.tokens_per_second)
    fitting = [plan for plan in plans if plan.fits(box)]
    if not fitting:
        return "Does not fit."
    best = max(fitting, key=lambda plan: plan.tokens_per_second)
    text = f"{best.placement} fits"
    if len(plans) > 1 and fastest is best:
        text += " and is the fastest"
    elif fastest is not best:
        gain = fastest.tokens_per_second / best.tokens_per_second
        text += f"; {fastest.placement} would be {gain:.2f} times as fast and does not fit"
    text = text.capitalize()
    if best is asked:
        return f"{text}."
    instead = " and no --teacher_device" if asked.placement == "shared" else ""
    return f"{text}: give --teacher_placement {best.placement}{instead}."


def remedy_table(plan: Plan, changes: list[tuple[str, Plan]], box: Box) -> str:
    if not changes:
        return f"{plan.placement}: no single option saves memory; it takes larger GPUs."
    lines = [f"To make {plan.placement} fit:"]
    for change, changed in changes:
        saved = (plan.largest - changed.largest) / GB
        fits = "fits" if changed.fits(box) else "not enough"
        lines.append(f"  {change:<50} saves {saved:>5.1f} GB: {fits:<11} {changed.tokens_per_second:>9,.0f} tokens/s")
    return "\n".join(lines)


def report(args: TrainArguments, footprint: Footprint, asked: Plan, others: list[Plan], box: Box) -> str:
    weights, trained = sum(footprint.weights.values()), gradient_bytes(footprint.student)
    notes = [
        f"On paper: matrix products and attention at {box.speed / 1e12:g} TFLOP/s, and nothing else that takes time.",
        "The scan is the plain one. Others may keep more or less for backward.",
    ]
    if args.teacher_device == "cpu":
        notes.append("The teacher's own time on the CPU is not in these figures.")
    if args.compile:
        notes.append("What --compile changes is not in these figures.")
    return "\n\n".join(
        [
            f"{args.batch_size} x {args.seq_length} tokens per rank in {args.dtype}; the student has "
            f"{weights / GB:.1f} GB of weights, {trained / GB:.1f} GB of them trained",
            *(gpu_table(kind, moments, box) for kind, moments in asked.gpus.items()),
            placement_table([asked, *others], box),
            advice(asked, others, box),
            "\n".join(notes),
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Bytes per GPU and time per step of a run, on paper. Takes all options of train_gpus.py, and:",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, default=5, help="GPUs of the node, the teacher's included (default: 5)")
    parser.add_argument("--gpu_gb", type=float, default=80, help="memory of each in 10^9 bytes (default: 80)")
    parser.add_argument(
        "--tflops", type=float, default=790, help="10^12 operations per second of its matrix products (default: 790)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options, rest = parser.parse_known_args(argv)
    args = parse_train_args(rest)
    box = Box(options.gpus, options.gpu_gb * GB, options.tflops * 1e12)
    placement = asked_placement(args, box)
    if box.n_gpus < (2 if placement == "dedicated" else 1):
        raise ValueError(f"--gpus {box.n_gpus}: too few; one GPU holds both models with --teacher_placement colocated")
    if min(box.gpu_bytes, box.speed) <= 0:
        raise ValueError(f"--gpu_gb {options.gpu_gb} --tflops {options.tflops}: expected numbers above 0")

    footprint = measure_footprint(args)
    asked = make_plan(args, footprint, box, placement)
    others = [make_plan(args, footprint, box, name) for name in other_placements(placement) if box.n_gpus > 1]
    print(report(args, footprint, asked, others, box))
    too_large = [plan for plan in (asked, *others) if not plan.fits(box)]
    if too_large:
        changes = [(change, changed, measure_footprint(changed)) for change, changed in alternatives(args)]
        for plan in too_large:
            print("\n" + remedy_table(plan, remedies(box, plan, changes), box))
    if options.json is not None:
        rows = [
            {**dataclasses.asdict(plan), "largest_bytes": plan.largest, "fits": plan.fits(box)}
            for plan in (asked, *others)
        ]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_entry(main))
