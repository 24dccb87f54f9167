"""Plans a run from configs alone, without a GPU: what every GPU holds and whether it fits, how long a step takes, where
to put the teacher, and which options to change if the run does not fit. plan_report.py prints the plan.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from arguments import TrainArguments
from distillation.gradient_sums import needs_sums
from distillation.teacher_forward import batches_at_once
from preflight.footprint import Footprint, measure_footprint
from preflight.live_memory import Items
from preflight.machine import Machine
from preflight.step_time import StepTime, prefetch_of, step_time
from preflight.transport import GB
from preflight.update_footprint import OptimizerFootprint, bytes_of_sums, gradient_bytes, optimizer_footprint

CERTAINTY = 0.25  # of times, which are estimates until they have been measured
# Estimated, not computed: the CUDA context, kernels, buffers of NCCL and cuBLAS, and fragmentation.
ALLOWANCE = {"CUDA, NCCL (allowance)": int(1.5 * GB)}

NOT_SHARED = "teacher's weights, not shared"
OF_OTHERS, MESSAGES = "gradients of others", "messages under way"
RECOMPUTE = "--gradient_checkpointing"
SUM_LIKE_WEIGHTS = "--grad_accumulation_dtype weights"

Moments = dict[str, Items]  # bytes of a GPU at the peak of each phase of a step
Change = tuple[str, TrainArguments, Footprint]  # options to change, as text, and the run with them


@dataclass(frozen=True)
class Plan:
    """Holds what a run takes with its teacher in one place."""

    placement: str
    n_students: int  # per node
    n_ranks: int
    gpus: dict[str, Moments]  # by kind of GPU
    step: StepTime
    answer_bytes: int  # that a rank receives from a teacher elsewhere, per micro step
    micro_step_tokens: int  # of all ranks

    @property
    def seconds(self) -> float:
        """Returns the seconds of an optimizer step."""
        return self.step.seconds

    @property
    def tokens(self) -> int:
        """Returns the tokens of an optimizer step."""
        return self.step.micro_steps * self.micro_step_tokens

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def received(self) -> Items:
        """Returns the bytes that a rank receives in an optimizer step, by purpose."""
        answers = {"teacher's answers": self.step.micro_steps * self.answer_bytes} if self.answer_bytes else {}
        return {**self.step.traffic.received, **answers}

    @property
    def largest(self) -> int:
        """Returns the most bytes that any GPU holds at any moment."""
        return max(largest_moment(moments)[1] for moments in self.gpus.values())

    def fits(self, machine: Machine) -> bool:
        return self.largest <= machine.gpu_bytes


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
    n_ranks = n_students * machine.n_nodes
    optimizer = optimizer_footprint(footprint.student, args, n_ranks)
    teacher = footprint.teacher if placement in ("dedicated", "shared") else None  # one that is elsewhere
    return Plan(
        placement,
        n_students,
        n_ranks,
        gpu_moments(args, footprint, optimizer, n_students, placement),
        step_time(args, footprint, optimizer, machine, n_students, placement),
        0 if teacher is None else teacher.answer,
        n_ranks * args.batch_size * args.seq_length,
    )


def gpu_moments(
    args: TrainArguments, footprint: Footprint, optimizer: OptimizerFootprint, n_students: int, placement: str
) -> dict[str, Moments]:
    """Returns what each kind of GPU holds, in bytes, with `n_students` on each node."""
    student = student_moments(args, footprint, optimizer, placement)
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


def student_moments(
    args: TrainArguments, footprint: Footprint, optimizer: OptimizerFootprint, placement: str
) -> Moments:
    """Returns what a student's GPU holds, in bytes; with the teacher if that is colocated."""
    gradients = gradient_bytes(footprint.student)
    teacher, colocated = footprint.teacher, placement == "colocated"
    always = {**footprint.weights, "gradients": gradients, "masters and moments": optimizer.kept}
    if needs_sums(args):
        always["sums of gradients"] = bytes_of_sums(footprint.student)
    if teacher is not None:
        always["teacher's answers"] = teacher.answer * (1 + prefetch_of(args, placement))
        weights = "teacher's weights" if args.stage == "distil" else NOT_SHARED
        always |= {weights: teacher.weights} if colocated else {"teacher's head": teacher.head}
    always |= ALLOWANCE
    passes = {**footprint.passes, **sending(footprint, optimizer)}
    moments = {name: {**always, **items} for name, items in passes.items()}
    moments["update"] = {**always, **footprint.left, "optimizer's work": optimizer.work}
    if optimizer.arrived:
        moments["update"][OF_OTHERS] = optimizer.arrived
    if teacher is not None and colocated and args.stage == "distil":  # before the student's forward
        moments = {"teacher": {**always, **footprint.left, "teacher's work": teacher.work}, **moments}
    return moments


def sending(footprint: Footprint, optimizer: OptimizerFootprint) -> Moments:
    """Returns what a backward pass holds while gradients are sent: as soon as the most messages are under way, and at
    its end. What it began with goes as gradients come; an alignment has one layer at a time until the end.
    """
    if not optimizer.in_flight:
        return {}
    is_distilled = "backward" in footprint.passes
    name = "backward" if is_distilled else "micro step"
    moments = {}
    for moment, part in ((f"{name}, sending", optimizer.full_after), (f"{name}'s end", 1.0)):
        left = 1.0 - part if is_distilled else 1.0
        items = {item: round(left * size) for item, size in footprint.passes[name].items()}
        arrived = round(part * optimizer.arrived)
        moments[moment] = {**items, MESSAGES: optimizer.in_flight, OF_OTHERS: arrived}
    return moments


def largest_moment(moments: Moments) -> tuple[str, int]:
    """Returns the phase in which a GPU holds most, and its bytes."""
    totals = {moment: sum(items.values()) for moment, items in moments.items()}
    moment = max(totals, key=totals.__getitem__)
    return moment, totals[moment]


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
    if is_distilled and not args.freeze_replaced_layers and args.takes_parts:
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
