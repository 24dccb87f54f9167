"""The part of a plan's text that is about time: how long a run takes, what bounds its steps, what helps, and how sure
that is.
"""

import contextlib
import dataclasses
import json
import os
import statistics
from pathlib import Path

import torch

from arguments import TrainArguments
from model_utils import DTYPES
from monitoring.speed import peak_operations
from preflight.alignment_footprint import shares_tensors
from preflight.machine import REACHED_OF_PRODUCTS, Machine
from preflight.plan import CERTAINTY, Plan
from preflight.speedups import Speedup
from preflight.step_time import WIRE
from preflight.transport import GB, GIVEN
from utils import format_duration

ACCUMULATIONS = (1, 4, 16)


def time_lines(args: TrainArguments, plan: Plan, machine: Machine) -> list[tuple[str, str]]:
    """Returns how long the run takes, and what a rank receives, as rows of name and text."""
    duration = format_duration(plan.seconds * args.max_steps)
    lines = [("time, estimated", f"{duration} at {plan.tokens_per_second:,.0f} tokens/s, {how_sure(plan)}")]
    if (speed := measured_speed(args)) is not None:
        duration = format_duration(plan.tokens * args.max_steps / speed)
        lines.append(("time, as measured", f"{duration} at the {speed:,.0f} tokens/s of {args.output_dir}"))
    if plan.n_ranks > 1:
        items = ", ".join(f"{name} {size / GB:.2g}" for name, size in plan.received.items() if size)
        lines.append(("a rank receives per step, GB", f"{sum(plan.received.values()) / GB:.2g}: {items}"))
        rate = f"{machine.link.rate / GB:g} GB/s, {machine.link.source}"
        lines.append(("  over its link", f"{plan.step.wire:.2g} s that no work hides; {rate}"))
    return lines


def how_sure(plan: Plan) -> str:
    """Returns how far off times may be."""
    return f"+-{CERTAINTY:.0%}" + (" of the work, and as sure as the link's rate" if plan.step.wire else "")


def accumulations(args: TrainArguments) -> list[TrainArguments]:
    """Returns the options with fewer and more micro steps to a step, and their own number."""
    numbers = sorted({*ACCUMULATIONS, args.grad_accumulation_steps})
    return [dataclasses.replace(args, grad_accumulation_steps=n) for n in numbers]


def accumulation_table(asked: Plan, plans: list[Plan]) -> str:
    """Returns a table of plans that accumulate more or fewer micro steps than the one asked for."""
    rows = [("--grad_accumulation_steps", "GB at most", "s per step", "of it the wire", "tokens/s", "bound by")]
    for plan in plans:
        n = plan.step.micro_steps
        name = f"{n}, as asked" if n == asked.step.micro_steps else f"{n}"
        figures = f"{plan.seconds:.3g}", f"{plan.step.wire:.2g}", f"{plan.tokens_per_second:,.0f}"
        rows.append((name, f"{plan.largest / GB:.1f}", *figures, plan.step.bound_by))
    return "\n".join(f"{row[0]:<26}" + "".join(f"{cell:>15}" for cell in row[1:5]) + f"   {row[5]}" for row in rows)


def bottleneck(plan: Plan, machine: Machine, speedups: list[Speedup]) -> str:
    """Returns what bounds the run, and what helps most."""
    part = plan.step.bound_by
    share = plan.step.savings()[part] / plan.seconds
    lines = [f"Bound by {part}: without it a step would be {share:.0%} shorter."]
    for i, (change, factor, price) in enumerate(speedups):
        lead = "What helps most" if i == 0 else "Without a change of the training"
        lines.append(f"{lead}: {change}, {factor:.2g} times as fast{f'; {price}' if price else ''}.")
    if not speedups:
        lines.append("No single option makes it much faster.")
    if part == WIRE and machine.link.source != GIVEN:
        lines.append(f"Give {GIVEN} what doctor.py --collectives measures on your machine.")
    return "\n".join(lines)


def measured_speed(args: TrainArguments) -> float | None:
    """Returns the median tokens per second of the run in --output_dir, or None if there is none."""
    file = Path(args.output_dir) / "metrics.jsonl"
    if not os.path.isfile(file):
        return None
    speeds = []
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short by a crash
            speeds.append(float(json.loads(line)["tokens_per_s"]))
    return statistics.median(speeds) if speeds else None


def knows_peak(args: TrainArguments) -> bool:
    name = torch.cuda.get_device_name(0) if torch.cuda.device_count() else "H100"
    return peak_operations(name, DTYPES[args.dtype]) is not None


def assumptions(args: TrainArguments, machine: Machine) -> str:
    notes = [
        f"Times are estimates, not yet measured on CUDA: +-{CERTAINTY:.0%}. Matrix products and attention count at "
        f"{machine.speed / 1e12:.0f} TFLOP/s, {REACHED_OF_PRODUCTS:.0%} of the peak, all other operations by the bytes "
        f"that they read and write one by one, at {machine.memory_rate / 1e12:.2g} TB/s. Launches by the host come on "
        "top.",
        "Norms, SwiGLUs and gates take the time of fused kernels, the scan that of mamba-ssm's. Memory is that of "
        "the plain forms; others may keep more or less for the backward pass.",
    ]
    if args.stage == "align":
        notes.append(
            "The student is taken to be made from this teacher, by make_student.py: what both have is held once."
            if shares_tensors(args)
            else "The student's files do not say that it was made from this teacher and not trained since: the teacher "
            "is counted beside it. A run holds once what both have."
        )
    if args.teacher_device == "cpu":
        notes.append("The teacher's time on the CPU is not included.")
    if args.tflops is None and not knows_peak(args):
        notes.append("The speed of these GPUs is not known; that of an H100 in bfloat16 is assumed. Give --tflops.")
    if args.compile:
        notes.append("What --compile saves is not included.")
    return "\n".join(notes)
