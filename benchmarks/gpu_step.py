"""The section of bench_gpu.py that trains: steps of `train_gpus.distil` with 8B shapes and random weights, on one
device.
"""

import statistics
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple
from unittest import mock

import torch
from bare_run import train_steps
from gpu_measure import PartRun, matmul_rate, peak_memory, reset_peak
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

import distillation.models
from arguments import TrainArguments, parse_train_args
from distillation.adamw import MasterWeightAdamW
from distillation.losses import shared_vocab
from distillation.models import Models, load_models
from distillation.objective import Distillation, DistillationModel
from inputs.option_values import PRESETS
from llamba import LlambaConfig
from llamba.kernels import kernels_for
from model_utils import DTYPES, apply_replacements, freeze_student_layers, freeze_student_mlps
from preflight.footprint import measure_footprint
from preflight.plan import ALLOWANCE, gpu_moments, largest_moment
from preflight.update_footprint import optimizer_footprint
from processes.devices import choose_devices
from processes.ranks import Ranks, process_groups
from text.batch import Batch

RANKS = 4  # one of which is measured: it has a quarter of the optimizer's state
STEPS, WARM_UP = 10, 3  # the first steps compile and allocate; the last has no batch to be ahead for
# Bytes that backward needs of a layer, per token and d_model: of a mixer's layer with its MLP frozen, and of a frozen
# layer of the teacher's. From the plan of the production run, rounded up.
MIXER_ACTIVATIONS, ATTENTION_ACTIVATIONS = 55, 40
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


def planned_bytes(shapes: Shapes, args: TrainArguments) -> int | None:
    """Returns what the plan of a run has for this GPU, of what torch allocates; None for models of fewer layers, which
    no plan is made for.
    """
    if shapes.student.n_layer != 32:
        return None
    placement = "colocated" if args.placement == "colocated" else "shared"
    footprint = measure_footprint(args)
    optimizer = optimizer_footprint(footprint.student, args, RANKS)
    moments = list(gpu_moments(args, footprint, optimizer, 1, placement).values())[-1]
    return largest_moment(moments)[1] - sum(ALLOWANCE.values())


# --- training ------------------------------------------------------------------------------------------------


class Share(MasterWeightAdamW):
    """Steps only on the parameters that one of `RANKS` ranks would own, and has no state for others."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.owned: set[int] = set()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if not self.owned:
            loads: list[list[nn.Parameter]] = [[] for _ in range(RANKS)]
            unsorted = (parameter for group in self.param_groups for parameter in group["params"])
            for parameter in sorted(unsorted, key=torch.Tensor.numel, reverse=True):
                min(loads, key=lambda load: sum(map(torch.Tensor.numel, load))).append(parameter)
            self.owned = set(map(id, loads[0]))
        everything = [group["params"] for group in self.param_groups]
        for group, parameters in zip(self.param_groups, everything, strict=True):
            group["params"] = [parameter for parameter in parameters if id(parameter) in self.owned]
        super().step(closure)
        for group, parameters in zip(self.param_groups, everything, strict=True):
            group["params"] = parameters


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
        planned_bytes=planned_bytes(shapes, args),
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
