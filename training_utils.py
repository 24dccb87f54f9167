"""The student in training: what it descends, its optimizer and schedule, the update, and the means of the objective's
figures over micro steps and ranks.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_wsd_schedule

from arguments import TrainArguments
from conversion.alignment import load_alignment
from distillation.adamw import MasterWeightAdamW
from distillation.exchange import AllReduce, Exchange, take_weights_of_rank_0
from distillation.gradient_sums import GradientSums, needs_sums
from distillation.losses import (
    compute_distill_loss as compute_distill_loss,  # users of the original layout look for it here
)
from distillation.models import Models, load_models
from distillation.objective import Distillation, DistillationModel
from distillation.owners import Owners
from distillation.teacher import Lane, PendingSignal
from distillation.update import LossScale, Outcome, step_or_skip
from inputs.option_checks import room_for_warmup
from llamba import LlambaForCausalLM
from llamba.parts import mixer_parameters
from model_utils import DTYPES
from processes.exits import StopRequest
from processes.ranks import Ranks
from text.batch import Batch

logger = logging.getLogger("train")


@dataclass(frozen=True)
class Job:
    """Holds what all parts of a run share: its options, its ranks, and the request to stop."""

    args: TrainArguments
    ranks: Ranks
    stop: StopRequest


class Objective(Protocol):
    """What a stage of training descends."""

    model: DistillationModel  # the student with the loss of distillation, by which it is evaluated in every stage

    def begin(self, shape: tuple[int, int]) -> None:
        """Brings the student to its first micro step of windows of `shape` (B, S)."""

    def backward(self, batch: Batch, answer: PendingSignal, factor: float, is_last: bool) -> Tensor:
        """Adds the gradients of `factor` times the loss; they are averaged over ranks if the micro step `is_last` of
        its optimizer step. Returns figures (n,) for a `Meter`, the loss first.
        """
        ...

    def named(self, sums: list[float], n_micro_steps: int) -> dict[str, Any]:
        """Returns the sums of such figures over the micro steps of an optimizer step as metrics.jsonl has them."""
        ...


def load_objective(
    args: TrainArguments, models: Models, ranks: Ranks, teacher_device: torch.device, chunk_tokens: int | None = None
) -> tuple[Objective, Lane]:
    """Returns what `--stage` descends, with this rank's student, and the lane to the teacher's answers. chunk_tokens:
    of a resumed run's loss.
    """
    if args.stage == "align":
        return load_alignment(args, models, ranks.device, chunk_tokens)
    student, head, lane = load_models(args, models, ranks, teacher_device)
    model = DistillationModel(student, head, models.vocab, args, chunk_tokens)
    return Distillation(model, ranks.device, averages=args.gradient_exchange == "allreduce"), lane


def parameter_groups(model: nn.Module, weight_decay: float, copied_lr_factor: float = 1.0) -> list[dict]:
    """Returns the trainable parameters in groups, mixers first: matrices decay, vectors (norms, biases, D) do not; all
    but the mixers have the factor as their `lr_factor`, which `build_schedule` reads.
    """
    mixers = mixer_parameters(model)
    kinds = [(is_matrix, factor) for factor in (1.0, copied_lr_factor) for is_matrix in (True, False)]
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {kind: [] for kind in kinds}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter.dim() >= 2, 1.0 if parameter in mixers else copied_lr_factor].append(parameter)
    return [
        {"params": members, "weight_decay": weight_decay if is_matrix else 0.0, "lr_factor": factor}
        for (is_matrix, factor), members in groups.items()
        if members
    ]


def build_optimizer(
    model: nn.Module, max_lr: float, weight_decay: float, master_weights: bool, copied_lr_factor: float = 1.0
) -> ZeroRedundancyOptimizer:
    """Returns AdamW (0.9, 0.95) whose masters and moments are kept on the one rank that owns the shard."""
    return ZeroRedundancyOptimizer(
        parameter_groups(model, weight_decay, copied_lr_factor),
        optimizer_class=MasterWeightAdamW,
        lr=max_lr,
        betas=(0.9, 0.95),
        master_weights=master_weights,
    )


def build_exchange(args: TrainArguments, student: LlambaForCausalLM) -> Exchange:
    """Returns what `--gradient_exchange` names, for the trained parameters of a student. Called by all ranks."""
    if args.gradient_exchange == "allreduce":
        settings = (args.max_lr, args.weight_decay, args.master_weights, args.copied_lr_factor)
        return AllReduce(student, build_optimizer(student, *settings))
    take_weights_of_rank_0(student)
    groups = parameter_groups(student, args.weight_decay, args.copied_lr_factor)
    by_rows, order = sparse_embedding(student), list(student.parameters())
    if args.stage == "distil":  # backward begins at the end; an alignment takes the layers from the first one on
        order.reverse()
    return Owners(order, groups, args.max_lr, args.master_weights, by_rows, args.gradient_bits)


def sparse_embedding(student: LlambaForCausalLM) -> nn.Parameter | None:
    """Returns the embedding if it is trained and not also the head, so that its gradient is zero but for the rows of
    tokens that were seen.
    """
    weight = student.get_input_embeddings().weight
    return weight if weight.requires_grad and weight is not student.lm_head.weight else None


def build_schedule(optimizer: torch.optim.Optimizer, args: TrainArguments, total_steps: int, done: int) -> LRScheduler:
    """Returns the schedule warm-up, stable, decay over `total_steps` optimizer steps, of which `done` are done."""
    for group in optimizer.param_groups:
        group["initial_lr"] = args.max_lr * group.get("lr_factor", 1.0)
    return get_wsd_schedule(
        optimizer,
        num_warmup_steps=warmup_steps(args, total_steps),
        num_decay_steps=round(args.decay_ratio * total_steps),
        num_training_steps=total_steps,
        decay_type="linear",
        min_lr_ratio=args.min_lr / args.max_lr if args.max_lr else 0.0,
        last_epoch=done - 1,
    )


def warmup_steps(args: TrainArguments, total_steps: int) -> int:
    """Returns the optimizer steps of the warm-up. A preset's are cut to what the decay leaves of a short run."""
    if args.warmup_steps is None:
        return round(args.warmup_ratio * total_steps)
    room = room_for_warmup(args, total_steps)
    if args.warmup_steps > room:
        text = "--warmup_steps %d of --preset %s: cut to %d, the run has %d optimizer steps"
        logger.info(text, args.warmup_steps, args.preset, room, total_steps)
    return min(args.warmup_steps, room)


class Update(NamedTuple):
    """Says what became of one optimizer step, the same on all ranks."""

    means: dict[str, Any]  # of a Meter
    lr: float  # of the mixers; of all else in a student that has none, since no option freezes them
    grad_norm: float  # before clipping
    outcome: Outcome
    loss_scale: dict[str, Any]  # after the update
    micro_steps: int
    tokens: int  # of all ranks


@dataclass(frozen=True)
class Learner:
    """Holds what learns: the student by its objective, what moves its weights, and the lane to the teacher."""

    objective: Objective
    exchange: Exchange
    schedule: LRScheduler
    loss_scale: LossScale
    sums: GradientSums | None  # of micro steps, where backward's own would lose bits
    lane: Lane
    total_steps: int  # optimizer steps of the whole run
    accumulate: int  # micro steps of each
    tokens_per_step: int  # of all ranks
    grad_clip: float

    @property
    def student(self) -> LlambaForCausalLM:
        return self.objective.model.student

    def micro_step(self, batch: Batch, answer: PendingSignal, is_last: bool) -> Tensor:
        """Runs forward and backward on a batch and the teacher's answer to it; ranks sum their gradients in the last
        micro step of an optimizer step. Returns the objective's figures for a `Meter`.
        """
        if self.sums is not None:
            self.sums.begin(is_last)
        self.exchange.begin(is_last)
        return self.objective.backward(batch, answer, self.loss_scale.value / self.accumulate, is_last)

    def update(self, means: dict[str, Any]) -> Update:
        """Steps optimizer and schedule. means: of the `Meter` that saw the micro steps."""
        lr = float(self.schedule.get_last_lr()[0])
        grad_norm, outcome = step_or_skip(self.exchange, self.loss_scale, self.grad_clip, means["loss"])
        self.schedule.step()
        loss_scale = dataclasses.asdict(self.loss_scale)
        return Update(means, lr, grad_norm, outcome, loss_scale, self.accumulate, self.tokens_per_step)


def build_learner(
    job: Job,
    objective: Objective,
    lane: Lane,
    total_steps: int,
    steps_done: int = 0,
    loss_scale: dict[str, Any] | None = None,
) -> Learner:
    """Returns the learner of a run of `total_steps` optimizer steps, of which `steps_done` are done; `loss_scale` is
    that of the checkpoint, if there is one.
    """
    args = job.args
    student = objective.model.student
    exchange = build_exchange(args, student)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    return Learner(
        objective=objective,
        exchange=exchange,
        schedule=build_schedule(exchange.optimizer, args, total_steps, steps_done),
        loss_scale=LossScale(**loss_scale) if loss_scale else LossScale.for_dtype(DTYPES[args.dtype]),
        sums=GradientSums(trained) if needs_sums(args) else None,
        lane=lane,
        total_steps=total_steps,
        accumulate=args.grad_accumulation_steps,
        tokens_per_step=args.grad_accumulation_steps * job.ranks.world_size * args.batch_size * args.seq_length,
        grad_clip=args.grad_clip,
    )


class Meter:
    """Collects what a rank sees in the micro steps of one optimizer step; `means` averages it over all ranks."""

    def __init__(self, named: Callable[[list[float], int], dict[str, Any]]) -> None:
        """named: names the figures, as `Objective.named`."""
        self.named = named
        self.seen: list[tuple[Tensor, Sequence[int]]] = []

    def add(self, figures: Tensor, window_ids: Sequence[int]) -> None:
        """Adds a micro step. figures (n,): as `Objective.backward` returns them; window_ids: of its batch."""
        self.seen.append((figures, window_ids))

    @property
    def n_micro_steps(self) -> int:
        return len(self.seen)

    def means(self, **seconds: float) -> dict[str, Any]:
        """Returns the means over ranks: of the figures as their objective names them, and of this rank's `seconds` per
        optimizer step. All ranks get the same; what is not finite on one of them is not finite in the mean.
        """
        sums = torch.stack([figures for figures, _ in self.seen]).sum(dim=0)  # (n,)
        n = len(sums)
        sums = torch.cat([sums, sums.new_tensor(list(seconds.values()))])
        dist.all_reduce(sums)
        values = [value / dist.get_world_size() for value in sums.tolist()]
        return {**self.named(values[:n], len(self.seen)), **dict(zip(seconds, values[n:], strict=True))}

    def windows(self, only_bad: bool = False) -> list[int]:
        """Returns the ids of this rank's windows; with `only_bad`, those of micro steps whose loss is not finite."""
        return [i for figures, ids in self.seen if not only_bad or not math.isfinite(figures[0].item()) for i in ids]

    def clear(self) -> None:
        self.seen.clear()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Returns the batch with its tensors on `device`; from pinned memory the copies run beside the host."""
    return batch.with_tensors(lambda tensor: tensor.to(device, non_blocking=True))
