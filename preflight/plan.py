"""Plans a run from configs alone, without a GPU: what every GPU holds and whether it fits, how long a step takes on
paper, where to put the teacher, and which options to change if the run does not fit. plan_report.py prints the plan.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from arguments import TrainArguments
from distillation.gradient_sums import needs_sums
from distillation.teacher_forward import batches_at_once
from model_utils import DTYPES
from monitoring.speed import peak_operations
from preflight.footprint import Footprint, gradient_bytes, measure_footprint, optimizer_bytes
from preflight.live_memory import Items
from processes.ranks import launched_world_size, local_world_size, was_launched

GB = 1e9
# Without visible GPUs: the machine of the README's long run, five H100.
N_GPUS, GPU_BYTES, PEAK = 5, 80 * GB, 989e12
REACHED_SHARE = 0.8  # of a GPU's peak that large matrix products reach
# Estimated, not computed: the CUDA context, kernels, buffers of NCCL and cuBLAS, and fragmentation.
ALLOWANCE = {"CUDA, NCCL (allowance)": int(1.5 * GB)}

NOT_SHARED = "teacher's weights, not shared"
RECOMPUTE = "--gradient_checkpointing"
SUM_LIKE_WEIGHTS = "--grad_accumulation_dtype weights"

Moments = dict[str, Items]  # bytes of a GPU at the peak of each phase of a step
Change = tuple[str, TrainArguments, Footprint]  # options to change, as text, and the run with them


@dataclass(frozen=True)
class Machine:
    """Holds one node, and how many such nodes there are."""

    n_gpus: int
    gpu_bytes: float  # of each GPU
    speed: float  # operations per second that matrix products reach on a GPU
    n_nodes: int = 1
    n_students: int | None = None  # that torchrun has started on each node, if it has


@dataclass(frozen=True)
class Plan:
    """Holds what a run takes with its teacher in one place."""

    placement: str
    n_students: int  # per node
    n_ranks: int
    gpus: dict[str, Moments]  # by kind of GPU
    student_seconds: float  # per micro step, as the next two
    teacher_seconds: float
    seconds: float
    tokens_per_second: float

    @property
    def largest(self) -> int:
        """Returns the most bytes that any GPU holds at any moment."""
        return max(largest_moment(moments)[1] for moments in self.gpus.values())

    def fits(self, machine: Machine) -> bool:
        return self.largest <= machine.gpu_bytes


# --- the machine ---------------------------------------------------------------------------------------------


def find_machine(args: TrainArguments) -> Machine:
    """Returns the machine that the options describe; what they leave out, torchrun and the visible GPUs say, or else it
    is a machine with five H100. Raises ValueError if it has too few GPUs.
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
    return Machine(
        n_gpus,
        gpu_bytes if args.gpu_gb is None else args.gpu_gb * GB,
        REACHED_SHARE * (peak if args.tflops is None else args.tflops * 1e12),
        args.nodes or launched_world_size() // local_world_size(),
        n_students,
    )


def gpus_needed(args: TrainArguments, n_students: int) -> int:
    """Returns the GPUs that a node needs for its students and their teacher."""
    if not args.has_teacher or args.placement == "colocated" or args.teacher_device == "cpu":
        return n_students
    if args.teacher_device is None:
        return n_students + 1
    index = args.teacher_device.removeprefix("cuda:")
    if not index.isdecimal():
        raise ValueError(f"--teacher_device {args.teacher_device}: expected cpu, or cuda:N")
    return max(n_students, int(index) + 1)


# --- one placement -------------------------------------------------------------------------------------------


def asked_placement(args: TrainArguments, machine: Machine) -> str:
    """Returns where the options put the teacher: `colocated`, beside every student; `dedicated`, on a GPU without a
    student; `shared`, one teacher on a student's GPU; or `none`, not on a GPU.
    """
    if not args.has_teacher or args.teacher_device == "cpu":
        return "none"
    if args.teacher_device is not None:
        n_students = machine.n_students or max(machine.n_gpus - 1, 1)
        return "shared" if teacher_index(args, machine) < n_students else "dedicated"
    return args.placement


def teacher_index(args: TrainArguments, machine: Machine) -> int:
    """Returns the index of the GPU that holds a node's only teacher."""
    return machine.n_gpus - 1 if args.teacher_device is None else int(args.teacher_device.removeprefix("cuda:"))


def make_plan(args: TrainArguments, footprint: Footprint, machine: Machine, placement: str) -> Plan:
    """Plans the run on this machine with its teacher in this place."""
    n_students = machine.n_gpus - 1 if placement == "dedicated" else machine.n_gpus
    if machine.n_students is not None and placement == asked_placement(args, machine):
        n_students = machine.n_students
    student_s, teacher_s = sum(footprint.operations.values()) / machine.speed, 0.0
    if placement != "none":
        assert footprint.teacher is not None
        teacher_s = footprint.teacher.operations / machine.speed * (1 if placement == "colocated" else n_students)
    works_ahead = placement == "dedicated" and args.teacher_prefetch != 0
    seconds = max(student_s, teacher_s) if works_ahead else student_s + teacher_s
    n_ranks = n_students * machine.n_nodes
    return Plan(
        placement,
        n_students,
        n_ranks,
        gpu_moments(args, footprint, n_students, n_ranks, placement),
        student_s,
        teacher_s,
        seconds,
        n_ranks * args.batch_size * args.seq_length / seconds,
    )


def gpu_moments(
    args: TrainArguments, footprint: Footprint, n_students: int, n_ranks: int, placement: str
) -> dict[str, Moments]:
    """Returns what each kind of GPU holds, in bytes, with `n_students` on each node."""
    student = student_moments(args, footprint, n_ranks, placement)
    if placement == "colocated":
        return {"every GPU": student}
    if placement == "none":
        return {"student GPU": student}
    assert footprint.teacher is not None
    n_at_once = min(batches_at_once(args.teacher_signal, args.batch_size * args.seq_length), n_students)
    work = n_at_once * footprint.teacher.work
    teacher = {"teacher's weights": footprint.teacher.weights, "teacher's work": work}
    if placement == "dedicated":
        return {"student GPU": student, "teacher GPU": {"forward": {**teacher, **ALLOWANCE}}}
    # The teacher may work during any phase of the student, and its head is not copied to its own device.
    both = {moment: {**items, "teacher's head": 0, **teacher} for moment, items in student.items()}
    return {"student GPU": student, "GPU of student and teacher": both}


def student_moments(args: TrainArguments, footprint: Footprint, n_ranks: int, placement: str) -> Moments:
    """Returns what a student's GPU holds, in bytes; with the teacher if that is colocated."""
    state, work = optimizer_bytes(footprint.student, args, n_ranks)
    gradients = gradient_bytes(footprint.student)
    teacher, colocated = footprint.teacher, placement == "colocated"
    prefetch = int(placement == "dedicated") if args.teacher_prefetch is None else args.teacher_prefetch
    always = {**footprint.weights, "gradients": gradients, "masters and moments": state}
    if needs_sums(args):
        always["sums of gradients"] = gradients // DTYPES[args.dtype].itemsize * torch.float32.itemsize
    if teacher is not None:
        always["teacher's answers"] = teacher.answer * (1 if colocated else 1 + prefetch)
        weights = "teacher's weights" if args.stage == "distil" else NOT_SHARED
        always |= {weights: teacher.weights} if colocated else {"teacher's head": teacher.head}
    always |= ALLOWANCE
    moments = {name: {**always, **items} for name, items in footprint.passes.items()}
    moments["update"] = {**always, **footprint.left, "optimizer's work": work}
    if teacher is not None and colocated and args.stage == "distil":  # before the student's forward
        moments = {"teacher": {**always, **footprint.left, "teacher's work": teacher.work}, **moments}
    return moments


def largest_moment(moments: Moments) -> tuple[str, int]:
    """Returns the phase in which a GPU holds most, and its bytes."""
    totals = {moment: sum(items.values()) for moment, items in moments.items()}
    moment = max(totals, key=totals.__getitem__)
    return moment, totals[moment]


def wire_bytes(args: TrainArguments, footprint: Footprint, plan: Plan) -> Items:
    """Returns the bytes that a rank receives in an optimizer step, by purpose. In a ring all-reduce a rank receives all
    gradients but its own part, twice. It receives updated weights from the ranks whose optimizer steps them.
    """
    trained, others = gradient_bytes(footprint.student), (plan.n_ranks - 1) / plan.n_ranks
    items = {"gradients": round(2 * others * trained), "updated weights": round(others * trained)}
    if plan.placement in ("dedicated", "shared") and footprint.teacher is not None:
        items["teacher's answers"] = footprint.teacher.answer * args.grad_accumulation_steps
    return items


# --- placements against each other, and what to change -------------------------------------------------------


def other_placements(args: TrainArguments, placement: str) -> list[str]:
    """Returns where else the teacher could be; in an alignment it shares its student's weights."""
    if placement == "none" or args.stage == "align":
        return []
    return [name for name in ("dedicated", "colocated") if name != placement]


def alternatives(args: TrainArguments) -> Iterator[tuple[str, TrainArguments]]:
    """Yields single changes that may save memory, the least costly first: as text, and the options with it."""
    is_distilled = args.stage == "distil"
    if needs_sums(args):
        yield SUM_LIKE_WEIGHTS, dataclasses.replace(args, grad_accumulation_dtype="weights")
    if is_distilled and args.teacher_signal == "logits":
        yield "--teacher_signal hidden", dataclasses.replace(args, teacher_signal="hidden")
    if is_distilled and (not args.gradient_checkpointing or args.checkpoint_blocks is not None):
        all_blocks = dataclasses.replace(args, gradient_checkpointing=True, checkpoint_blocks=None)
        yield RECOMPUTE, all_blocks
    if args.batch_size > 1:
        size, accumulate = args.batch_size // 2, args.grad_accumulation_steps * 2
        smaller = dataclasses.replace(args, batch_size=size, grad_accumulation_steps=accumulate)
        text = f"--batch_size {size} --grad_accumulation_steps {accumulate}"
        if needs_sums(smaller) and not needs_sums(args):  # which could take more than the smaller batch saves
            text += f" {SUM_LIKE_WEIGHTS}"
            smaller = dataclasses.replace(smaller, grad_accumulation_dtype="weights")
        yield text, smaller
    if is_distilled and not args.freeze_replaced_layers and args.layers:
        yield "--freeze_replaced_layers", dataclasses.replace(args, freeze_replaced_layers=True)
    if is_distilled and not args.freeze_mlp:
        yield "--freeze_mlp", dataclasses.replace(args, freeze_mlp=True)
    if not is_distilled and args.eval_interval:
        yield "--eval_interval 0", dataclasses.replace(args, eval_interval=0)
    if args.dtype == "float32":
        yield "--dtype bfloat16", dataclasses.replace(args, dtype="bfloat16")


def remedies(machine: Machine, plan: Plan, changes: list[Change]) -> list[tuple[str, Plan]]:
    """Returns the changes that save memory, each with its plan. If recomputing all blocks makes the run fit, the fewest
    blocks that do come before it.
    """
    found: list[tuple[str, Plan]] = []
    for change, args, footprint in changes:
        changed = make_plan(args, footprint, machine, plan.placement)
        if change == RECOMPUTE and changed.fits(machine):
            found += fewest_blocks(args, footprint, machine, plan, changed)
        if changed.largest < plan.largest:
            found.append((change, changed))
    return found


def fewest_blocks(
    args: TrainArguments, footprint: Footprint, machine: Machine, plan: Plan, all_blocks: Plan
) -> Iterator[tuple[str, Plan]]:
    """Yields the fewest blocks to recompute that make `plan` fit, if they are fewer than all."""
    n_layer = footprint.student.config.n_layer
    part = (plan.largest - machine.gpu_bytes) / (plan.largest - all_blocks.largest)
    for n_blocks in range(math.ceil(n_layer * part), n_layer):
        some = dataclasses.replace(args, checkpoint_blocks=n_blocks)
        changed = make_plan(some, measure_footprint(some), machine, plan.placement)
        if changed.fits(machine):
            yield f"{RECOMPUTE} --checkpoint_blocks {n_blocks}", changed
            return
