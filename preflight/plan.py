"""What a run will take, before it takes it: what every GPU holds and whether that fits, how long a step is on paper,
on which GPU the teacher should sit, and what to change where it does not fit. From configs alone, without a GPU.
plan_report.py prints it.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from arguments import TrainArguments
from model_utils import DTYPES
from monitoring.speed import peak_operations
from preflight.footprint import Footprint, Items, gradient_bytes, measure_footprint, optimizer_bytes
from processes.ranks import launched_world_size, local_world_size, was_launched

GB = 1e9
# The box of the README's long run, where there is no GPU to look at: 5 H100.
N_GPUS, GPU_BYTES, PEAK = 5, 80 * GB, 989e12
REACHED = 0.8  # of a GPU's peak, by its large matrix products
# For the CUDA context and its kernels, the buffers of NCCL and cuBLAS, and the crumbs between blocks. Not computed.
ALLOWANCE = {"CUDA, NCCL (allowance)": int(1.5 * GB)}

RECOMPUTE = "--gradient_checkpointing"

Moments = dict[str, Items]  # what a GPU holds at the largest moment of each phase of a step
Change = tuple[str, TrainArguments, Footprint]  # an option to change, and what the run is then


@dataclass(frozen=True)
class Box:
    """One node: its GPUs, the bytes of each, and the operations per second that matrix products reach on one; how many
    such nodes there are; and the students that torchrun has started on each, if it has.
    """

    n_gpus: int
    gpu_bytes: float
    speed: float
    n_nodes: int = 1
    n_students: int | None = None


@dataclass(frozen=True)
class Plan:
    """A run with its teacher in one place. gpus: kind of GPU -> moments; seconds are of a micro step; n_students are
    those of a node.
    """

    placement: str
    n_students: int
    n_ranks: int
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


# --- the machine ---------------------------------------------------------------------------------------------


def find_box(args: TrainArguments) -> Box:
    """What the options say of the machine, else torchrun and the visible GPUs, else a box of five H100. Raises
    ValueError if it has too few GPUs.
    """
    visible = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpu_bytes, peak = GPU_BYTES, PEAK
    if visible:
        gpu_bytes = min(gpu.total_memory for gpu in visible)
        peak = peak_operations(visible[0].name, DTYPES[args.dtype]) or PEAK
    n_students = local_world_size() if was_launched() else None
    needed = gpus_needed(args, n_students or 1)
    n_gpus = args.gpus or len(visible) or (needed if n_students else max(needed, N_GPUS))
    if n_gpus < needed:
        raise ValueError(
            f"--gpus {n_gpus}: too few, this run takes {needed}; one GPU holds both models with "
            "--teacher_placement colocated"
        )
    return Box(
        n_gpus,
        gpu_bytes if args.gpu_gb is None else args.gpu_gb * GB,
        REACHED * (peak if args.tflops is None else args.tflops * 1e12),
        args.nodes or launched_world_size() // local_world_size(),
        n_students,
    )


def gpus_needed(args: TrainArguments, n_students: int) -> int:
    """Of a node with that many students."""
    if args.kl_weight == 0 or args.teacher_placement == "colocated" or args.teacher_device == "cpu":
        return n_students
    if args.teacher_device is None:
        return n_students + 1
    index = args.teacher_device.removeprefix("cuda:")
    if not index.isdecimal():
        raise ValueError(f"--teacher_device {args.teacher_device}: expected cpu, or cuda:N")
    return max(n_students, int(index) + 1)


# --- one placement -------------------------------------------------------------------------------------------


def asked_placement(args: TrainArguments, box: Box) -> str:
    """Besides `colocated`, and `dedicated` on a GPU without a student: `shared`, one teacher on a student's GPU, and
    `none`, no teacher on any.
    """
    if args.kl_weight == 0 or args.teacher_device == "cpu":
        return "none"
    if args.teacher_device is not None:
        n_students = box.n_students or max(box.n_gpus - 1, 1)
        return "shared" if teacher_index(args, box) < n_students else "dedicated"
    return args.teacher_placement


def teacher_index(args: TrainArguments, box: Box) -> int:
    """Of the GPU of a node's one teacher."""
    return box.n_gpus - 1 if args.teacher_device is None else int(args.teacher_device.removeprefix("cuda:"))


def make_plan(args: TrainArguments, footprint: Footprint, box: Box, placement: str) -> Plan:
    n_students = box.n_gpus - 1 if placement == "dedicated" else box.n_gpus
    if box.n_students is not None and placement == asked_placement(args, box):
        n_students = box.n_students
    student_s, teacher_s = sum(footprint.operations.values()) / box.speed, 0.0
    if placement != "none":
        assert footprint.teacher is not None
        teacher_s = footprint.teacher.operations / box.speed * (1 if placement == "colocated" else n_students)
    works_ahead = placement == "dedicated" and args.teacher_prefetch != 0
    seconds = max(student_s, teacher_s) if works_ahead else student_s + teacher_s
    n_ranks = n_students * box.n_nodes
    return Plan(
        placement,
        n_students,
        n_ranks,
        gpu_moments(args, footprint, n_ranks, placement),
        student_s,
        teacher_s,
        seconds,
        n_ranks * args.batch_size * args.seq_length / seconds,
    )


def gpu_moments(args: TrainArguments, footprint: Footprint, n_ranks: int, placement: str) -> dict[str, Moments]:
    student = student_moments(args, footprint, n_ranks, placement)
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


def student_moments(args: TrainArguments, footprint: Footprint, n_ranks: int, placement: str) -> Moments:
    """Of a student's GPU; where its teacher is colocated, with that."""
    state, work = optimizer_bytes(footprint.student, args, n_ranks)
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


def wire_bytes(args: TrainArguments, footprint: Footprint, plan: Plan) -> Items:
    """What a rank receives in an optimizer step, by what it is for. A ring takes a gradient around twice, but for
    a rank's own part; updated weights come from the ranks that have stepped them.
    """
    trained, others = gradient_bytes(footprint.student), (plan.n_ranks - 1) / plan.n_ranks
    items = {"gradients": round(2 * others * trained), "updated weights": round(others * trained)}
    if plan.placement in ("dedicated", "shared") and footprint.teacher is not None:
        items["teacher's answers"] = footprint.teacher.answer * args.grad_accumulation_steps
    return items


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
