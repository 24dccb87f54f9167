"""The sections of bench_gpu.py that train: steps of `train_gpus.distil` with 8B shapes and random weights on one
device, and the time of one step by kernel and by part of the models.
"""

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any, NamedTuple
from unittest import mock

import torch
from bare_run import train_steps
from gpu_measure import PartRun, matmul_rate, peak_memory, reset_peak
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

import distillation.models
from arguments import TrainArguments, parse_train_args
from distillation.adamw import MasterWeightAdamW
from distillation.losses import shared_vocab
from distillation.models import Models, load_models
from distillation.objective import Distillation, DistillationModel
from inputs.option_values import PRESETS
from llamba import DiscreteMamba2, LlambaConfig
from llamba.kernels import kernels_for
from model_utils import DTYPES, apply_replacements, freeze_student_layers, freeze_student_mlps
from processes.devices import choose_devices
from processes.ranks import Ranks, process_groups
from text.batch import Batch

RANKS = 4  # one of which is measured: it has a quarter of the optimizer's state
STEPS, WARM_UP = 10, 3  # the first steps compile and allocate; the last has no batch to be ahead for
# Bytes that backward needs of a layer, per token and d_model: of a mixer's layer with its MLP frozen, and of a frozen
# layer of the teacher's. From the plan of the production run, rounded up.
MIXER_ACTIVATIONS, ATTENTION_ACTIVATIONS = 55, 40
PART, REST = "part of the step: ", "optimizer and the rest"
BACKWARD = "autograd::engine::evaluate_function"
# Names of kernels of cuBLAS, CUTLASS and Triton's templates, and of the CPU's operators.
PRODUCT = re.compile(r"gemm|gemv|nvjet|cutlass|xmma|splitk|triton_tem|aten::(add|badd)?b?mm$", re.IGNORECASE)
ATTENTION = re.compile(r"attention|flash|fmha|sdpa", re.IGNORECASE)
ROOM = 0.95  # of a card's memory that models and steps may take; the rest is fragments and the driver's


class Shapes(NamedTuple):
    """Holds both models' configurations, the teacher's layers that the student has, and the length of a window."""

    teacher: LlamaConfig
    student: LlambaConfig
    layers: list[int]
    seq_length: int


def real_shapes(n_layer: int) -> Shapes:
    """Returns the shapes of Llama 3.1 8B and Llamba 8B, or the same with fewer layers."""
    preset = PRESETS / "llamba-8b"
    teacher = LlamaConfig.from_pretrained(preset / "teacher", num_hidden_layers=n_layer)
    student = LlambaConfig.from_pretrained(preset / "student", n_layer=n_layer)
    layers = sorted({index * n_layer // 32 for index in (14, 16, 17, 30)})
    return Shapes(teacher, student, layers, 1024)


def tiny_shapes() -> Shapes:
    """Returns shapes for a trial on a CPU."""
    teacher = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    ssm = {"d_state": 4, "n_v_heads": 4, "n_qk_heads": 2, "chunk_size": 8}
    student = LlambaConfig(vocab_size=300, d_model=32, n_layer=3, mlp_cfg={"intermediate_size": 48}, ssm_cfg=ssm)
    return Shapes(teacher, student, [1], 40)


# --- what fits -----------------------------------------------------------------------------------------------


def choose_shapes(run: PartRun) -> tuple[Shapes, TrainArguments]:
    """Returns the largest models that fit on this card, and the options. Raises ValueError if none fit."""
    if run.quick:
        shapes = tiny_shapes()
        return shapes, train_arguments(run, shapes)
    room = ROOM * torch.cuda.mem_get_info(run.device)[0] if run.device.type == "cuda" else float("inf")
    for n_layer in (32, 24, 16, 8):
        shapes = real_shapes(n_layer)
        for extra in ("", "--gradient_checkpointing"):
            args = train_arguments(run, shapes, extra)
            if memory_need(shapes, args) <= room:
                return shapes, args
    raise ValueError(f"{room / 1e9:.0f} GB of memory are too few for 8 layers of these models")


def train_arguments(run: PartRun, shapes: Shapes, extra: str = "") -> TrainArguments:
    """Returns the options of the production command, on one device."""
    options = f"--dtype bfloat16 --seq_length {shapes.seq_length} --freeze_mlp --freeze_replaced_layers"
    options += f" --layers {' '.join(map(str, shapes.layers))} --max_steps {STEPS} --save_interval 0"
    options += f" {run.training_options} {extra}"
    if "colocated" not in run.training_options:
        options += f" --teacher_device {run.device}"
    return parse_train_args(options.split())


def memory_need(shapes: Shapes, args: TrainArguments) -> int:
    """Estimates the bytes of weights, gradients, one rank's masters and moments, activations and the loss."""
    meta = torch.device("meta")
    dtype, d_model, n_layer = DTYPES[args.dtype], shapes.student.d_model, shapes.student.n_layer
    teacher, student = build(shapes.teacher, dtype, meta), build(shapes.student, dtype, meta)
    apply_replacements(student, teacher, shapes.layers)
    freeze_student_mlps(student)
    freeze_student_layers(student, shapes.layers)
    head = student.lm_head.weight
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    weights = sum(p.nbytes for p in [*teacher.parameters(), *student.parameters(), head])  # and the teacher's head
    kept = MIXER_ACTIVATIONS * (n_layer - len(shapes.layers)) + ATTENTION_ACTIVATIONS * len(shapes.layers)
    if args.gradient_checkpointing:
        kept = MIXER_ACTIVATIONS + dtype.itemsize * n_layer  # of one layer at a time, and each layer's input
    activations = args.batch_size * args.seq_length * d_model * kept
    return weights + trained * (dtype.itemsize + 12 // RANKS) + activations + 6 * head.numel() + 2**30


# --- training ------------------------------------------------------------------------------------------------


class Share(MasterWeightAdamW):
    """Steps only on the parameters that one of `RANKS` ranks would own, and has no state for others."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.owned: set[int] = set()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if not self.owned:
            loads: list[list[nn.Parameter]] = [[] for _ in range(RANKS)]
            everything = (parameter for group in self.param_groups for parameter in group["params"])
            for parameter in sorted(everything, key=torch.Tensor.numel, reverse=True):
                min(loads, key=lambda load: sum(map(torch.Tensor.numel, load))).append(parameter)
            self.owned = set(map(id, loads[0]))
        super().step(closure)

    def _step_one(self, parameter: torch.Tensor, group: dict) -> None:
        if id(parameter) in self.owned:
            super()._step_one(parameter, group)


def build(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Builds a model with random weights, drawn on its device and in its dtype."""
    with torch.device(device):
        return AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype, attn_implementation="sdpa")


def random_batches(shapes: Shapes, batch_size: int) -> Iterator[Batch]:
    """Yields batches of random tokens without end."""
    while True:
        yield Batch.from_windows(torch.randint(shapes.teacher.vocab_size, (batch_size, shapes.seq_length + 1)))


def train(shapes: Shapes, args: TrainArguments, log: Any) -> None:
    """Trains as train_gpus.py does, with models made in memory. Calls `log.begin(model, teacher)` before the first
    step; see `train_steps` for what else a log needs.
    """
    device, teacher_device = choose_devices(args.teacher_device, args.teacher_placement, runs_teacher=True)
    vocab = shared_vocab(shapes.student.vocab_size, shapes.teacher.vocab_size)
    teachers = []

    def make_teacher(name: str, dtype: torch.dtype, place: torch.device, with_head: bool = True) -> PreTrainedModel:
        teachers.append(build(shapes.teacher, dtype, place).eval().requires_grad_(False))
        return teachers[-1]

    def make_student(name: str, dtype: torch.dtype, place: torch.device, flag: str) -> PreTrainedModel:
        return build(shapes.student, dtype, place)

    def run(ranks: Ranks) -> None:  # a function, so that what uses the process groups is freed before them
        student, head, lane = load_models(args, Models("", "", vocab, None), ranks, teacher_device)
        model = DistillationModel(student, head, vocab, args)
        log.begin(model, teachers.pop())
        batches = random_batches(shapes, args.batch_size)
        train_steps(args, batches, STEPS, Distillation(model, ranks.device), lane, ranks, log)
        lane.close()

    with (
        mock.patch.multiple(distillation.models, get_teacher_model=make_teacher, get_student_model=make_student),
        mock.patch("training_utils.MasterWeightAdamW", Share),
        process_groups(device) as ranks,
    ):
        run(ranks)


# --- the step ------------------------------------------------------------------------------------------------


class StepLog:
    """Records the metrics of each step, and the peak of memory in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.rows = device, list[dict[str, float]]()
        self.peak_bytes = self.flops_per_token = 0

    def begin(self, model: DistillationModel, teacher: PreTrainedModel) -> None:
        reset_peak(self.device)
        self.flops_per_token = flops_per_token(model.student, teacher)

    def write(self, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)
        self.peak_bytes = peak_memory(self.device)

    def median(self, name: str) -> float:
        return statistics.median(row[name] for row in self.rows[WARM_UP:-1])


def step(run: PartRun) -> None:
    """Measures the median step of a case."""
    shapes, args = choose_shapes(run)
    rate = matmul_rate(run)
    log = StepLog(run.device)
    train(shapes, args, log)
    seconds = log.median("step_time_s")
    tokens_per_s = args.batch_size * args.seq_length / seconds
    run.emit(
        run.case,
        run.training_options,
        seconds=seconds,
        peak_bytes=log.peak_bytes,
        planned_bytes=memory_need(shapes, args),
        tokens_per_s=round(tokens_per_s),
        mfu=tokens_per_s * log.flops_per_token / rate,
        teacher_wait_s=log.median("teacher_wait_s"),
        n_layer=shapes.student.n_layer,
        checkpointing="yes" if args.gradient_checkpointing else "no",
        scan=kernels_for(run.device.type, DTYPES[args.dtype]).scan_name,
        loss=log.rows[-1]["loss"],
    )


def flops_per_token(student: nn.Module, teacher: nn.Module) -> int:
    """Counts products with weights: both forward passes, the student's gradients by inputs and by trained weights."""
    of_student, of_teacher = (
        [m.weight for m in model.modules() if isinstance(m, nn.Linear)] for model in (student, teacher)
    )
    trained = [weight for weight in of_student if weight.requires_grad]
    return 2 * sum(weight.numel() for weight in [*of_teacher, *of_student, *of_student, *trained])


# --- where the time goes -------------------------------------------------------------------------------------


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
