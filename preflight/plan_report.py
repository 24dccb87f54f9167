"""Prints the plan of a run, for `train_gpus.py --dry_run`:

    python train_gpus.py --dry_run --gpus 5 --gpu_gb 80 --freeze_mlp --freeze_replaced_layers

Which process has which GPU, what each GPU holds, how long the run takes and what it leaves on the disk; at the end,
whether it fits and what to change if it does not. GB are 10^9 bytes.
"""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch

from arguments import TrainArguments
from checkpointing.run_folder import DiskRoom, disk_room
from llamba.parts import parameter_table
from paths import readable
from preflight.alignment_footprint import shares_tensors
from preflight.footprint import find_configs, measure_footprint
from preflight.machine import Machine, find_machine
from preflight.plan import (
    Moments,
    Plan,
    alternatives,
    asked_placement,
    largest_moment,
    make_plan,
    other_placements,
    remedies,
    teacher_index,
)
from preflight.speedups import PRICES, best_of, faster_options, speedups
from preflight.time_report import accumulation_table, accumulations, assumptions, bottleneck, time_lines
from preflight.transport import GB
from preflight.update_footprint import gradient_bytes
from selection.auto import for_plan

# --- the parts of a plan -------------------------------------------------------------------------------------


def machine_text(args: TrainArguments, machine: Machine) -> str:
    n_visible = torch.cuda.device_count()
    nodes = "" if machine.n_nodes == 1 else f"{machine.n_nodes} nodes, each with "
    text = f"Planned for {nodes}{machine.n_gpus} GPU(s) of {machine.gpu_bytes / GB:.3g} GB"
    missing = [f"--{name}" for name in ("gpus", "gpu_gb", "tflops", "link_gb_per_s") if vars(args)[name] is None]
    if n_visible == 0 and missing:
        text += f". No GPU is visible here: describe yours with {', '.join(missing)}"
    elif args.gpus is None and args.gpu_gb is None:
        text += f": {torch.cuda.get_device_name(0)}"
    return text + "."


def seats(plan: Plan, args: TrainArguments, machine: Machine) -> str:
    """Returns a table of which process of a node has which GPU."""
    teacher = ""
    if plan.placement == "colocated":
        shares = args.stage == "align" and shares_tensors(args)
        teacher = "a teacher that shares its student's weights" if shares else "a teacher beside its student"
    elif args.has_teacher:
        place = "the CPU" if plan.placement == "none" else f"cuda:{teacher_index(args, machine)}"
        teacher = f"runs the teacher on {place}"
    students = range(plan.n_students)
    idle = set(range(plan.n_students, machine.n_gpus))
    if plan.placement == "dedicated":
        idle.discard(teacher_index(args, machine))
    rows = [("process", "student on", "also")]
    rows += [(f"rank {i}", f"cuda:{i}", teacher if i == 0 or plan.placement == "colocated" else "") for i in students]
    lines = [f"{rank:<10}{place:<12}{also}".rstrip() for rank, place, also in rows]
    if idle:
        lines.append(f"cuda:{', cuda:'.join(map(str, sorted(idle)))}: not used")
    return "\n".join(lines)


def gpu_table(kind: str, moments: Moments, machine: Machine) -> str:
    """Returns a table of what a GPU holds at the peak of each phase, one item per line."""
    lines = [f"{kind + ', GB':<34}" + "".join(f"{moment:>10}" for moment in moments)]
    for name in dict.fromkeys(name for items in moments.values() for name in items):
        sizes = [items.get(name, 0) for items in moments.values()]
        if any(sizes):
            lines.append(f"  {name:<32}" + "".join(f"{size / GB:>10.3g}" if size else f"{'-':>10}" for size in sizes))
    lines.append(f"  {'all':<32}" + "".join(f"{sum(items.values()) / GB:>10.1f}" for items in moments.values()))
    moment, size = largest_moment(moments)
    spare = (machine.gpu_bytes - size) / GB
    verdict = f"fits, {spare:.1f} GB to spare" if spare >= 0 else f"does not fit, {-spare:.1f} GB too much"
    return "\n".join([*lines, f"  {size / GB:.1f} of {machine.gpu_bytes / GB:g} GB ({moment}): {verdict}"])


def placement_table(plans: list[Plan], machine: Machine) -> str:
    """Returns a table of placements. Work is that of a micro step, wire and step are an optimizer step's."""
    titles = ("teacher", "students", "GB at most", "fits", "student, s", "teacher, s", "wire, s", "step, s", "tokens/s")
    rows = [
        (
            plan.placement,
            f"{plan.n_students}",
            f"{plan.largest / GB:.1f}",
            "yes" if plan.fits(machine) else "no",
            *(f"{s:.3g}" for s in (plan.step.student, plan.step.teacher, plan.step.wire, plan.seconds)),
            f"{plan.tokens_per_second:,.0f}",
        )
        for plan in plans
    ]
    return "\n".join("".join(f"{cell:>12}" for cell in row) for row in (titles, *rows))


def advice(asked: Plan, others: list[Plan], machine: Machine, has_choice: bool = True) -> str:
    """Returns which placement to choose: the fastest that fits. has_choice: whether the run could have another."""
    if (asked.placement == "none" or not has_choice) and asked.fits(machine):
        return "Fits."
    plans = [asked, *others]
    fastest = max(plans, key=lambda plan: plan.tokens_per_second)
    fitting = [plan for plan in plans if plan.fits(machine)]
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


def remedy_table(what: str, plan: Plan, changes: list[tuple[str, Plan]], machine: Machine) -> str:
    """Returns a table of what makes a plan fit. what: names it."""
    if not changes:
        return f"{what}: no single option saves memory; use larger GPUs."
    lines = [f"To make {what} fit:"]
    for change, changed in changes:
        saved = (plan.largest - changed.largest) / GB
        fits = "fits" if changed.fits(machine) else "not enough"
        lines.append(f"  {change:<50} saves {saved:>5.1f} GB: {fits:<11} {changed.tokens_per_second:>9,.0f} tokens/s")
    return "\n".join(lines)


def run_table(args: TrainArguments, plan: Plan, machine: Machine, room: DiskRoom) -> str:
    """Returns a table of tokens, steps and time, of what a rank receives, and of checkpoints on the disk."""
    lines = [
        ("tokens per optimizer step", f"{plan.tokens:,}"),
        ("tokens in all, at most", f"{plan.tokens * args.max_steps:,} in {args.max_steps:,} steps"),
        *time_lines(args, plan, machine),
        *disk_lines(room),
    ]
    return "\n".join(f"{name:<34}{text}" for name, text in lines)


def disk_lines(room: DiskRoom) -> list[tuple[str, str]]:
    """Returns what checkpoints take, as rows of name and text."""
    kept = f"{room.n_most}, {room.n_most * room.size / GB:,.0f} GB; the disk has room for {room.n_fit}"
    return [("a checkpoint, GB", f"{room.size / GB:.3g}"), ("checkpoints on the disk, at most", kept)]


def disk_advice(args: TrainArguments, room: DiskRoom) -> str:
    """Returns what to change if the disk has no room for all checkpoints; else nothing."""
    free = f"The disk of --output_dir {args.output_dir} has room for {room.n_fit} checkpoint(s)"
    if not room.is_enough:
        return f"{free}: the run would not start; choose another disk, or make room."
    if room.n_fit < room.n_most:
        return f"{free} of {room.n_most}: give --save_total_limit {room.n_fit - 1}, or raise --save_interval."
    return ""


# --- the whole plan ------------------------------------------------------------------------------------------


def print_plan(args: TrainArguments) -> int:
    """Prints the plan and returns the exit code. Raises ValueError, as a run does, if models and options do not go
    together.
    """
    logging.getLogger("llamba").setLevel(logging.WARNING)  # which kernels the meta device has is of no interest
    if args.plan_json is not None:
        what, folder = f"--plan_json {args.plan_json}", Path(args.plan_json).absolute().parent
        with readable(what, folder):
            if not folder.is_dir():
                raise ValueError(f"{what}: its folder is not there; make it, or name another file")
    args, note = for_plan(args, find_configs(args))
    machine = find_machine(args)
    footprint = measure_footprint(args)
    asked = make_plan(args, footprint, machine, asked_placement(args, machine))
    placements = other_placements(args, asked.placement) if machine.n_gpus > 1 else []
    others = [make_plan(args, footprint, machine, name) for name in placements]
    too_large = [plan for plan in (asked, *others) if not plan.fits(machine)]
    changed = [*alternatives(args), *faster_options(args)]
    changes = [(change, new, measure_footprint(new)) for change, new in changed if too_large or change in PRICES]
    room = disk_room(args, footprint.student, args.max_steps * args.grad_accumulation_steps)
    weights, trained = sum(footprint.weights.values()), gradient_bytes(footprint.student)
    parts = [
        machine_text(args, machine),
        seats(asked, args, machine),
        f"{parameter_table(footprint.student)}\n{weights / GB:.1f} GB of weights in {args.dtype}, "
        f"{trained / GB:.1f} GB of them trained",
        f"{args.batch_size} x {args.seq_length} tokens per rank and micro step:",
        *(gpu_table(kind, moments, machine) for kind, moments in asked.gpus.items()),
        run_table(args, asked, machine, room),
        accumulation_table(asked, [make_plan(one, footprint, machine, asked.placement) for one in accumulations(args)]),
        placement_table([asked, *others], machine),
        bottleneck(asked, machine, best_of(speedups(args, footprint, machine, [asked, *others], changes))),
        assumptions(args, machine),
        advice(asked, others, machine, has_choice=args.stage == "distil"),
        disk_advice(args, room),
    ]
    print("\n\n".join(part for part in [note, *parts] if part))
    for plan in too_large:
        what = "the alignment" if args.stage == "align" else plan.placement
        print("\n" + remedy_table(what, plan, remedies(machine, plan, changes), machine))
    if args.plan_json is not None:
        rows = [plan_figures(plan, machine) for plan in (asked, *others)]
        Path(args.plan_json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def plan_figures(plan: Plan, machine: Machine) -> dict[str, Any]:
    """Returns a plan's figures for --plan_json. Times of student and teacher are a micro step's, others a step's."""
    return {
        **dataclasses.asdict(plan),
        "student_seconds": plan.step.student,
        "teacher_seconds": plan.step.teacher,
        "wire_seconds": plan.step.wire,
        "seconds": plan.seconds,
        "tokens_per_second": plan.tokens_per_second,
        "received_bytes": plan.received,
        "bound_by": plan.step.bound_by,
        "largest_bytes": plan.largest,
        "fits": plan.fits(machine),
    }
