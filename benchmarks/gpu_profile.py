"""The section of bench_gpu.py that profiles a step: its time by kernel and by part of the models, and idle."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from gpu_measure import PartRun
from gpu_step import WARM_UP, StepLog, choose_shapes, train
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function
from transformers import PreTrainedModel

from distillation.objective import DistillationModel
from llamba import DiscreteMamba2

PART, REST = "part of the step: ", "optimizer and the rest"
BACKWARD = "autograd::engine::evaluate_function"
# Names of kernels of cuBLAS, CUTLASS and Triton's templates, and of the CPU's operators.
PRODUCT = re.compile(r"gemm|gemv|nvjet|cutlass|xmma|splitk|triton_tem|aten::(add|badd)?b?mm$", re.IGNORECASE)
ATTENTION = re.compile(r"attention|flash|fmha|sdpa", re.IGNORECASE)


class ProfilingLog(StepLog):
    """Profiles the first step after the warm-up, with parts of the models marked."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self.profiler = torch.profiler.profile(activities=activities)

    def begin(self, model: DistillationModel, teacher: PreTrainedModel) -> None:
        super().begin(model, teacher)
        mark_parts(model, teacher)

    def write(self, metrics: dict[str, float]) -> None:
        super().write(metrics)
        if len(self.rows) not in (WARM_UP, WARM_UP + 1):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        (self.profiler.start if len(self.rows) == WARM_UP else self.profiler.stop)()


def mark_parts(model: DistillationModel, teacher: PreTrainedModel) -> None:
    """Marks parts of the models for a profile. An operator belongs to the innermost mark around it: the loss is the
    whole model without its backbone, the scan (with convolution and gate) is a mixer without its projections.
    """
    mark(model, "loss")
    mark(model.student.backbone, "student")
    mark(teacher.base_model, "teacher")
    for mixer in model.student.modules():
        if isinstance(mixer, DiscreteMamba2):
            mark(mixer, "scan")
            mark(mixer.in_proj, "student")
            mark(mixer.out_proj, "student")


def mark(module: nn.Module, part: str) -> None:
    """Opens a profiler range of this name around every forward pass of a module."""
    open_ranges: list[record_function] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function(PART + part))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)  # checkpointing leaves a forward pass by an exception


def profile(run: PartRun) -> None:
    """Profiles one step: seconds by kernel, by part of the models, and idle."""
    shapes, args = choose_shapes(run)
    log = ProfilingLog(run.device)
    train(shapes, args, log)
    found = breakdown(log.profiler.events())
    total = found.kernels.total()
    run.emit(run.case, "all kernels", seconds=total, share=1.0)
    run.emit(run.case, "matrix products", seconds=found.products, share=found.products / total)
    for part, seconds in found.parts.most_common():
        run.emit(run.case, f"part: {part}", seconds=seconds, share=seconds / total)
    for name, seconds in found.kernels.most_common(12):
        run.emit(run.case, f"kernel: {name}", seconds=seconds, share=seconds / total)
    run.emit(run.case, "from first to last", seconds=found.span)
    run.emit(run.case, "idle in that time", seconds=found.span - found.busy, share=1 - found.busy / found.span)


class Breakdown(NamedTuple):
    """Holds seconds of kernels by name, by part of the models, and of matrix products; `span` is from the start of the
    first kernel to the end of the last, `busy` the part of it in which at least one ran.
    """

    kernels: Counter[str]
    parts: Counter[str]
    products: float
    span: float
    busy: float


def breakdown(events: Iterable[FunctionEvent]) -> Breakdown:
    """Adds up a profile's kernels; without a GPU, the CPU's operators by their own time, without those they call."""
    work = [event for event in events if not event.is_user_annotation]  # marks on the GPU are no kernels
    operators = [event for event in work if event.device_type == DeviceType.CPU]
    running = [event for event in work if event.device_type != DeviceType.CPU]
    part_of = parts_of(operators)
    kernels, parts = Counter[str](), Counter[str]()
    if running:
        for event in running:
            kernels[short(event.name)] += event.time_range.elapsed_us() / 1e6
        for event in operators:
            parts[part_of(event)] += sum(kernel.duration for kernel in event.kernels) / 1e6
        # Kernels that no profiled thread started are the teacher's, which has a thread of its own.
        parts["teacher"] += kernels.total() - parts.total()
    else:
        running = operators
        for event in running:
            kernels[short(event.name)] += event.self_cpu_time_total / 1e6
            parts[part_of(event)] += event.self_cpu_time_total / 1e6
    products = sum(seconds for name, seconds in kernels.items() if PRODUCT.search(name) and not ATTENTION.search(name))
    spans = sorted((event.time_range.start / 1e6, event.time_range.end / 1e6) for event in running)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return Breakdown(kernels, parts, products, reached - spans[0][0], busy)


def parts_of(operators: list[FunctionEvent]) -> Callable[[FunctionEvent], str]:
    """Returns a function from an operator to its part of the models: that of the innermost mark around it; in backward,
    that of the forward operator with the same sequence number.
    """
    forward: dict[tuple[int, int | None], str] = {}

    def part_of(event: FunctionEvent) -> str:
        outer: FunctionEvent | None = event
        while outer is not None:
            if outer.is_user_annotation and outer.name.startswith(PART):
                return outer.name.removeprefix(PART)
            if outer.name.startswith(BACKWARD):
                return forward.get((outer.sequence_nr, outer.fwd_thread), REST)
            outer = outer.cpu_parent
        return REST

    for event in sorted(operators, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not in_backward(event):
            forward[event.sequence_nr, event.thread] = part_of(event)  # of several with one number, the last counts
    return part_of


def in_backward(event: FunctionEvent | None) -> bool:
    while event is not None and not event.name.startswith(BACKWARD):
        event = event.cpu_parent
    return event is not None


def short(name: str) -> str:
    return name.removeprefix("void ").replace("|", "/")[:60]
