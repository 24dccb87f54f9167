"""Measures what a micro step of `--stage align` takes, on the meta device, by the stage's own code."""

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from arguments import TrainArguments
from checkpointing.files import STATE_FILE, read_state
from conversion.alignment import Alignment
from conversion.teacher_stream import TeacherStream
from conversion.teacher_weights import TeacherWeights
from conversion.unfinished import FIGURES
from distillation.losses import shared_vocab
from distillation.objective import DistillationModel
from distillation.teacher import PendingSignal
from distillation.wait_clock import WaitClock
from evaluation.held_out import sums_on_device
from inputs.option_values import command_that_makes
from llamba import LlambaForCausalLM
from monitoring.undisturbed import undisturbed
from preflight.kernel_bytes import counted_as_on_gpus
from preflight.live_memory import BACKWARD, Items, LiveMemory
from text.batch import Batch

TEACHER, MIXER = "teacher's work", "activations"
EVALUATION = "both models and their logits"


class TracedAlignment(NamedTuple):
    """Holds one rank's micro step: bytes of the teacher's weights that the student has not, bytes beside weights and
    gradients at the peak and after it, likewise those at the peak of an evaluation, operations, and bytes moved.
    """

    held: int
    peak: Items
    left: Items
    evaluation: Items | None  # None: the run has no evaluations
    operations: Items
    moved: Items
    teacher_operations: int
    teacher_moved: int


class Shapes(TeacherWeights):
    """Gives the parts of a teacher on the meta device, as `TeacherWeights` those of one on the disk."""

    def __init__(self, teacher: PreTrainedModel) -> None:
        self.config, self.teacher = teacher.config, teacher

    def embedding(self, *_: Any) -> Tensor:
        return self.teacher.get_input_embeddings().weight

    def layer(self, index: int, *_: Any) -> Any:
        return self.teacher.base_model.layers[index]

    def norm(self, *_: Any) -> Any:
        return self.teacher.base_model.norm

    def head(self, *_: Any) -> Tensor:
        return self.teacher.get_output_embeddings().weight

    def rotary(self, *_: Any) -> Any:
        return self.teacher.base_model.rotary_emb


class SharedShapes(TeacherStream):
    """Takes tensors of one name and shape for equal, as in a student that was made from this teacher."""

    @staticmethod
    def are_equal(given: Tensor, twin: Tensor) -> bool:
        return True


class OwnShapes(TeacherStream):
    """Takes no tensors for equal, as in a student that was trained, or not made from this teacher."""

    @staticmethod
    def are_equal(given: Tensor, twin: Tensor) -> bool:
        return False


def shares_tensors(args: TrainArguments) -> bool:
    """Returns whether the student has its teacher's tensors but for the mixers, bit for bit in --dtype, as far as its
    files say: it was made by make_student.py, or is yet to be, and no run but alignments has trained it since.
    """
    return has_teachers_tensors(args.student_model, args.dtype)


def has_teachers_tensors(student_model: str, dtype: str, after: frozenset[str] = frozenset()) -> bool:
    """Returns likewise for a folder. after: students that came after it, which a folder may name that was written anew.

    Of weights that were written in fewer bits than `dtype` has, rounding may have changed any.
    """
    folder = Path(student_model)
    if not folder.is_dir():
        return command_that_makes(student_model) is not None
    if (folder / STATE_FILE).is_file():
        run = read_state(folder).get("arguments", {})
        before, after = str(run.get("student_model")), after | {student_model}
        return run.get("stage") == "align" and before not in after and has_teachers_tensors(before, dtype, after)
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # not made by make_student.py
        return json.loads((folder / FIGURES).read_text())["made_with"]["dtype"] in (dtype, "float32")
    return False


def not_shared(args: TrainArguments, teacher: PreTrainedModel, student: LlambaForCausalLM) -> int:
    """Returns the bytes of the teacher's weights that a rank holds beside its student."""
    return stream_of(args, teacher, student).bytes_held


def stream_of(args: TrainArguments, teacher: PreTrainedModel, student: LlambaForCausalLM) -> TeacherStream:
    kind = SharedShapes if shares_tensors(args) else OwnShapes
    vocab = shared_vocab(student.config.vocab_size, teacher.config.vocab_size)
    return kind(Shapes(teacher), student, vocab)


def trace_alignment(
    args: TrainArguments, teacher: PreTrainedModel, student: LlambaForCausalLM, batch: Batch, chunk_tokens: int
) -> TracedAlignment:
    """Computes a micro step, and an evaluation if the run has any. The gradients, which are kept from step to step, do
    not count. chunk_tokens: that an evaluation takes at a time where the options do not say.
    """
    stream = stream_of(args, teacher, student)
    model = DistillationModel(student, stream.head, len(stream.head), args, chunk_tokens)
    alignment = Alignment(model, stream)
    alignment.begin((args.batch_size, args.seq_length))
    of_stream = [parameter for layer in stream.layers for parameter in layer.parameters()]
    kept = [gradients.flat for gradients in alignment.gradients]
    given = [*model.parameters(), *model.buffers(), *of_stream, *kept, stream.embedding, stream.head, batch.input_ids]
    given += [*stream.norm.parameters(), *stream.rotary.buffers(), batch.labels, batch.loss_mask]
    evaluation = trace_evaluation(args, model, stream, batch, LiveMemory(given)) if args.eval_interval else None
    memory = LiveMemory(given)
    for norm in (norm for layer in stream.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)):
        norm.register_forward_pre_hook(lambda *_: memory.enter(TEACHER))
    for block in alignment.blocks.values():
        block.mixer.register_forward_pre_hook(lambda *_: memory.enter(MIXER))
        block.mixer.register_forward_hook(lambda *_: memory.enter(BACKWARD))
    memory.enter(TEACHER)
    with memory, counted_as_on_gpus(memory, model.student.dtype):
        nothing = PendingSignal(None, WaitClock(torch.device("cpu")))
        alignment.backward(batch, nothing, 1.0, is_last=False)
        left = dict(memory.live)
    operations, moved = dict(memory.operations), dict(memory.moved)
    of_teacher = operations.pop(TEACHER), moved.pop(TEACHER)
    return TracedAlignment(stream.bytes_held, memory.at_peak, left, evaluation, operations, moved, *of_teacher)


def trace_evaluation(
    args: TrainArguments, model: DistillationModel, stream: TeacherStream, batch: Batch, memory: LiveMemory
) -> Items:
    """Returns the bytes at the peak of an evaluation: the whole teacher's answer, the student's hidden states, and some
    tokens' logits of both.
    """
    memory.enter(EVALUATION)
    with undisturbed(model.student, compiled=False), memory:
        signal = stream(batch.input_ids)  # (B, S, D)
        sums_on_device(model.loss_inputs(batch, signal), args.temperature, model.chosen_chunk_tokens())
    return memory.at_peak
