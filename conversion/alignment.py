"""What a student learns in `train_gpus.py --stage align`: each mixer the output of the attention in whose place it is,
from the teacher's own hidden states. A layer does not see the errors of those before it, and backward stays within it,
so that the activations of one layer exist at a time.
"""

import logging
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from arguments import TrainArguments
from conversion.teacher_stream import TeacherStream, Traced
from conversion.teacher_weights import TeacherWeights
from distillation.exchange import take_weights_of_rank_0
from distillation.models import Models
from distillation.objective import DistillationModel
from distillation.teacher import ColocatedTeacher, PendingSignal
from inputs.options import default_values
from llamba import LlambaBlock, LlambaForCausalLM
from llamba.teacher_parts import take_parts
from model_utils import DTYPES, compile_modules, get_student_model
from text.batch import Batch

logger = logging.getLogger("train")

# Options of distillation that have nothing to do here.
IDLE = (
    *("freeze_mlp", "freeze_replaced_layers", "copied_lr_factor", "gradient_checkpointing", "checkpoint_blocks"),
    *("teacher_signal", "teacher_placement", "teacher_prefetch"),
)
IN_EVALUATIONS = ("ce_weight", "kl_weight", "temperature", "loss_chunk_tokens")


# --- the losses ----------------------------------------------------------------------------------------------


SMALLEST = 1e-6  # of |hidden|^2


def relative_error(output: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Returns |output - target|^2 / |target|^2 of tensors (B, S, D), the mean over windows: a scalar, float32 inside.
    Such a mean does not depend on how the windows are shared out over ranks and micro steps.

    Of a layer that gives zeros, as one put in to make a Llama deeper, the target is 0: at least `SMALLEST` of
    |hidden|^2 of the window, `hidden` (B, S, D) being the layer's input, is divided by.
    """
    error, size, least = (squares_of(x) for x in (output.float() - target.float(), target, hidden))  # (B,) each
    return (error / torch.maximum(size, SMALLEST * least)).mean()


def squares_of(x: Tensor) -> Tensor:
    """Returns the sum of squares of each window of x (B, S, D): (B,), float32."""
    return x.float().square().sum(dim=(1, 2))


def attention_error(block: LlambaBlock, traced: Traced) -> Tensor:
    """Returns the squared relative error of a block's mixer, with the heads kept beside it: 0 equals the teacher's
    attention, 1 gives zeros.
    """
    with torch.no_grad():
        u = block.input_layernorm(traced.hidden)  # (B, S, D)
    mixed = block.mix(u, position_embeddings=traced.angles)
    return relative_error(mixed, traced.attention, traced.hidden)


# --- gradients of ranks --------------------------------------------------------------------------------------


class LayerGradients:
    """Keeps the gradients of a layer in one tensor, so that ranks average them in one message."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        sizes = [parameter.numel() for parameter in parameters]
        self.flat = parameters[0].new_zeros(sum(sizes))
        for parameter, part in zip(parameters, self.flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)  # backward adds to it in place
        self.work: dist.Work | None = None

    def begin_average(self) -> None:
        """Begins to average over ranks; the caller may compute meanwhile. All ranks call it for the same layers in the
        same order.
        """
        self.flat.div_(dist.get_world_size())  # before the sum, which could overflow in float16
        self.work = dist.all_reduce(self.flat, async_op=True)

    def wait(self) -> None:
        """Waits for the average; on a GPU its stream waits, and the host does not."""
        assert self.work is not None
        self.work.wait()
        self.work = None


# --- the objective -------------------------------------------------------------------------------------------


class Alignment:
    """Is what a `Learner` descends in `--stage align`: the mean over recurrent layers of their squared relative errors.

    model: the student with the loss of distillation, by which it is evaluated. stream: of its teacher.
    evaluates: whether the run does. averages: whether it averages gradients over ranks; else an exchange does.
    """

    def __init__(
        self, model: DistillationModel, stream: TeacherStream, evaluates: bool = False, averages: bool = True
    ) -> None:
        self.model, self.stream, self.evaluates = model, stream, evaluates
        layers = model.student.backbone.layers
        self.blocks = {i: layer for i, layer in enumerate(layers) if isinstance(layer, LlambaBlock)}
        mixers = [block.mixer for block in self.blocks.values()] if averages else []
        self.gradients = [LayerGradients(list(mixer.parameters())) for mixer in mixers]

    def begin(self, shape: tuple[int, int]) -> None:
        """Brings the student to its first micro step of windows of `shape` (B, S)."""
        self.model.train()
        if self.evaluates:
            self.model.chosen_chunk_tokens()

    def backward(self, batch: Batch, answer: PendingSignal, factor: float, is_last: bool) -> Tensor:
        """Adds the gradients of `factor` times the loss, layer after layer. Where they are averaged over ranks, a
        layer's are while the next ones compute, if the micro step `is_last` of its optimizer step. Returns the loss and
        the squared relative errors, (1 + layers,). The teacher runs here, so that its `answer` is not asked for.
        """
        errors: list[Tensor] = []
        for i, traced in enumerate(self.stream.walk(batch.input_ids)):
            if i not in self.blocks:
                continue
            error = attention_error(self.blocks[i], traced)
            (error * (factor / len(self.blocks))).backward()
            if is_last and self.gradients:
                self.gradients[len(errors)].begin_average()
            errors.append(error.detach())
            if len(errors) == len(self.blocks):  # nothing needs what the teacher computes above
                break
        for gradients in self.gradients if is_last else []:
            gradients.wait()
        squares = torch.stack(errors)  # (layers,)
        return torch.cat([squares.mean()[None], squares])

    def named(self, sums: list[float], n_micro_steps: int) -> dict[str, Any]:
        """Returns figures of an optimizer step as metrics.jsonl has them: the loss, and the relative error of each
        layer. sums: of what `backward` returned in its micro steps.
        """
        loss, *squares = (value / n_micro_steps for value in sums)
        errors = [round(math.sqrt(value), 6) for value in squares]
        return {"loss": loss, "alignment": {"layers": list(self.blocks), "errors": errors}}


def load_alignment(
    args: TrainArguments, models: Models, device: torch.device, chunk_tokens: int | None = None
) -> tuple[Alignment, ColocatedTeacher]:
    """Returns the alignment of this rank's student, of which only the mixers are trained, and the lane to the answers
    of its teacher, which runs when a result is asked for. chunk_tokens: of a resumed run's loss.
    """
    log_idle_options(args)
    dtype = DTYPES[args.dtype]
    weights = TeacherWeights(models.teacher, name=args.teacher_model)
    student = get_student_model(models.student, dtype, device, models.student_flag)
    if args.takes_parts and not student.config.has_attention:
        take_parts(student, weights.config, args.layers, args.kept_heads, lambda index: weights.layer(index, dtype))
    take_weights_of_rank_0(student)
    mixers = freeze_all_but_mixers(student)
    if args.compile:
        compile_modules(student, mixers)
    stream = TeacherStream(weights, student, models.vocab)
    text = "of the teacher's weights %s MB are held beside the student, %s MB are the student's own"
    logger.info(text, f"{stream.bytes_held / 1e6:,.1f}", f"{stream.bytes_shared / 1e6:,.1f}")
    model = DistillationModel(student, stream.head, models.vocab, args, chunk_tokens)
    averages = args.gradient_exchange == "allreduce"
    return Alignment(model, stream, args.eval_interval > 0, averages), ColocatedTeacher(stream, device)


def freeze_all_but_mixers(student: LlambaForCausalLM) -> list[nn.Module]:
    """Leaves only the mixers of the recurrent layers to train, and returns them."""
    mixers: list[nn.Module] = [layer.mixer for layer in student.backbone.layers if isinstance(layer, LlambaBlock)]
    student.requires_grad_(False)
    for mixer in mixers:
        mixer.requires_grad_(True)
    return mixers


def log_idle_options(args: TrainArguments) -> None:
    """Logs which options have another value than their default, given or by the preset, and change nothing here."""
    defaults, names = default_values(type(args)), [*IDLE, *(() if args.eval_interval else IN_EVALUATIONS)]
    if idle := [f"--{name}" for name in names if getattr(args, name) != defaults[name]]:
        text = "--stage align trains only the mixers, each for itself; given or by the preset, it does not use %s"
        logger.info(text, ", ".join(idle))
