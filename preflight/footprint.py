"""Measures what one training step takes, in bytes and in operations, without weights and without a GPU: teacher and
student are built on the meta device, where a tensor has a shape and no memory, and a step of the run's own code is
computed on them while `LiveMemory` adds up the storages that are alive, and the work of each operation.

Activations, recomputation, the loss's buffers and the optimizer's work are therefore those of the code itself. Flash
attention, DDP's buckets and the optimizer's shards are modelled here. The scan is the plain one, but for its time.
"""

import dataclasses
import os
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from arguments import TrainArguments
from conversion.alignment import freeze_all_but_mixers
from distillation.fused_loss import CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES, choose_chunk_tokens
from distillation.losses import shared_vocab
from distillation.objective import DistillationModel
from distillation.pairing import check_pair
from distillation.teacher import teacher_head
from distillation.teacher_forward import Teacher
from inputs.option_values import PRESETS, preset_values
from llamba import LlambaConfig, LlambaForCausalLM
from llamba.llama import FrozenMLP, use_kernels
from model_utils import (
    DTYPES,
    apply_replacements,
    get_configs,
    locate_model,
    prepare_student,
)
from preflight.alignment_footprint import trace_alignment
from preflight.kernel_bytes import counted_as_on_gpus
from preflight.live_memory import BACKWARD, Items, LiveMemory
from preflight.operation_counts import aten
from preflight.update_footprint import gradient_bytes, n_bytes
from text.batch import Batch

# Passes over gradients: into their bucket, where those of the micro steps before are read, added and written.
ADDING_UP = 3


@dataclass(frozen=True)
class TeacherFootprint:
    """Holds what a teacher takes, in bytes and operations, for one rank's part of the batch."""

    weights: int
    work: int  # beside the weights, at the peak of the forward pass
    operations: int
    moved: int  # as of a `Footprint`
    answer: int
    head: int  # of the output weight that a student holds if answers are hidden states


@dataclass(frozen=True)
class Footprint:
    """Holds one rank's share of a micro step.

    student: on the meta device, frozen by the run's options.
    weights: bytes of the student's weights: trained, frozen, or of replaced layers.
    passes: bytes beside weights, gradients and optimizer state at the peak of each pass: of forward and backward. In an
        alignment both alternate, and the teacher's work is among them: it is one pass. An evaluation may take more than
        that, and is another; in a distillation it takes less than a step.
    left: those of them that are still alive when the optimizer steps.
    operations: of the student's products and attention, recomputation included.
    moved: bytes that everything else reads and writes, likewise.
    """

    student: LlambaForCausalLM
    weights: Items
    passes: dict[str, Items]
    left: Items
    operations: Items
    moved: Items
    teacher: TeacherFootprint | None


def measure_footprint(args: TrainArguments) -> Footprint:
    """Raises ValueError, as a run does, if models and options do not go together."""
    teacher, student = build_models(args)
    vocab = shared_vocab(student.config.vocab_size, teacher.config.vocab_size)
    shape = (args.batch_size, args.seq_length)
    with torch.device("meta"):
        tokens = torch.zeros(shape, dtype=torch.int64)  # (B, S)
        batch = Batch(tokens, tokens.clone(), torch.ones(shape, dtype=torch.bool))
    weights = weights_by_fate(student)
    if args.stage == "align":
        traced = trace_alignment(args, teacher, student, batch, gpu_chunk_tokens(args.dtype, vocab))
        beside = TeacherFootprint(traced.held, 0, traced.teacher_operations, traced.teacher_moved, 0, 0)
        passes = {"micro step": traced.peak} | ({"evaluate": traced.evaluation} if traced.evaluation else {})
        return Footprint(student, weights, passes, traced.left, traced.operations, traced.moved, beside)
    answer = head = teacher_footprint = None
    if args.kl_weight > 0:
        if args.teacher_signal == "hidden":
            head = teacher_head(teacher, vocab)
        use_kernels(teacher, FrozenMLP)
        memory = LiveMemory([*teacher.parameters(), *teacher.buffers(), tokens])
        with memory, counted_as_on_gpus(memory, teacher.dtype):
            answer = Teacher(teacher, args.teacher_signal, vocab)(tokens)  # (B, S, D_t or vocab)
        teacher_footprint = TeacherFootprint(
            n_bytes(teacher.parameters()),
            memory.peak,
            memory.operations.total(),
            memory.moved.total(),
            answer.nbytes,
            0 if head is None else head.nbytes,
        )
    # A compiled loss would take fewer buffers.
    uncompiled = dataclasses.replace(args, compile=False)
    model = DistillationModel(student, head, vocab, uncompiled, gpu_chunk_tokens(args.dtype, vocab)).train()
    return Footprint(student, weights, *trace_step(model, batch, answer), teacher_footprint)


# --- models without weights ----------------------------------------------------------------------------------


def find_configs(args: TrainArguments) -> tuple[PretrainedConfig, LlambaConfig]:
    """Returns the configs of teacher and student. Those of a preset's models on the hub are read from the preset's own
    copies, so that planning needs no network.
    """
    preset = preset_values(args.preset, TrainArguments, "train")
    places = []
    for role in ("teacher", "student"):
        option = f"{role}_model"
        name, copy = vars(args)[option], PRESETS / args.preset / role
        if name == preset.get(option) and not os.path.isdir(name) and copy.is_dir():
            places.append(str(copy))
        else:
            places.append(locate_model(f"--{option}", name, args.local_files_only, needs_weights=False))
    return get_configs(*places)


def build_models(args: TrainArguments) -> tuple[PreTrainedModel, LlambaForCausalLM]:
    """Builds teacher and student as a run has them when training begins, on the meta device."""
    teacher_config, student_config = find_configs(args)
    check_pair(args, student_config, teacher_config)
    AttentionInterface.register("on_meta", attention_on_meta)
    settings = {"dtype": DTYPES[args.dtype], "attn_implementation": "on_meta"}
    with torch.device("meta"):
        teacher = AutoModelForCausalLM.from_config(teacher_config, **settings).eval().requires_grad_(False)
        student = LlambaForCausalLM._from_config(student_config, **settings)
    if not student.config.has_attention:
        apply_replacements(student, teacher, args.layers, args.kept_heads)
    if args.stage == "align":
        freeze_all_but_mixers(student)
    else:
        prepare_student(student, dataclasses.replace(args, compile=False))
    return teacher, student


def attention_on_meta(module, query: Tensor, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, None]:
    """Causal flash attention: query (B, H, S, P), key and value (B, K, S, P) -> (B, S, H, P). On the meta device torch
    itself would choose the form that holds all scores in memory.
    """
    return aten._scaled_dot_product_flash_attention(query, key, value, is_causal=True)[0].transpose(1, 2), None


def gpu_chunk_tokens(dtype: str, vocab: int) -> int:
    """Returns the tokens that the loss takes at a time on a GPU with free memory."""
    return choose_chunk_tokens(vocab, DTYPES[dtype], torch.device("cpu")) * (CUDA_CHUNK_BYTES // CPU_CHUNK_BYTES)


# --- a micro step ---------------------------------------------------------------------------------------------


class TracedStep(NamedTuple):
    """Holds what is measured of a `Footprint` in its micro step."""

    passes: dict[str, Items]
    left: Items
    operations: Items
    moved: Items


def trace_step(model: DistillationModel, batch: Batch, answer: Tensor | None) -> TracedStep:
    """Computes one micro step."""
    given = [*model.parameters(), *model.buffers(), batch.input_ids, batch.labels, batch.loss_mask]
    memory = LiveMemory(given if answer is None else [*given, answer])
    for parameter in model.parameters():
        if parameter.requires_grad:
            # DDP copies a gradient into its bucket, which `gradient_bytes` counts, and frees it.
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    backbone = model.student.backbone
    backbone.register_forward_pre_hook(lambda *_: memory.enter("activations"))
    backbone.register_forward_hook(lambda *_: memory.enter("loss"))
    with memory, counted_as_on_gpus(memory, model.student.dtype):
        loss, figures = model(batch, answer)
        forward = memory.at_peak
        memory.restart_peak()
        memory.enter(BACKWARD)
        loss.backward()
        backward, left = memory.at_peak, dict(memory.live)
    # What is alive after backward stays until the next forward pass has computed its own.
    forward = dict(Counter(forward) + Counter(left))
    memory.moved[BACKWARD] += ADDING_UP * gradient_bytes(model.student)
    passes = {"forward": forward, "backward": backward}
    return TracedStep(passes, left, dict(memory.operations), dict(memory.moved))


def weights_by_fate(student: LlambaForCausalLM) -> Items:
    """Returns the bytes of weights that are trained, that are frozen, and of replaced layers."""
    layers = student.config.attention_layers
    replaced = {id(p) for index in layers for p in student.backbone.layers[index].parameters()}
    fates = {"weights, trained": 0, "weights, frozen": 0, "weights of replaced layers": 0}
    for parameter in student.parameters():
        fate = "weights, trained" if parameter.requires_grad else "weights, frozen"
        fates["weights of replaced layers" if id(parameter) in replaced else fate] += parameter.nbytes
    return fates
