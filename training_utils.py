"""The student in training: with its loss as one module under DDP, its optimizer and schedule, the update, and the means
of what the module returns over micro steps and ranks.
"""

import contextlib
import dataclasses
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_wsd_schedule

from arguments import TrainArguments
from distillation.adamw import LossScale, MasterWeightAdamW, Outcome, step_or_skip
from distillation.fused_loss import choose_chunk_tokens, fused_distill_loss
from distillation.losses import LossInputs, LossWeights
from distillation.losses import (
    compute_distill_loss as compute_distill_loss,  # users of the original layout look for it here
)
from distillation.teacher import Lane
from llamba import LlambaForCausalLM
from llamba.parts import mixer_parameters
from model_utils import DTYPES
from processes.devices import can_compile
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


class DistillationModel(nn.Module):
    """Holds the student with its loss, so that DDP sees one module from tokens to scalars.

    teacher_head: the teacher's output weight (vocab, D_t), which turns its hidden states into logits, or None
        where the teacher sends logits or does not run.
    vocab: entries that both vocabularies have.
    chunk_tokens: tokens that the loss takes at a time where the options do not say: as the run had it before, or None
        to choose by the memory that is free.
    """

    def __init__(
        self,
        student: LlambaForCausalLM,
        teacher_head: Tensor | None,
        vocab: int,
        args: TrainArguments,
        chunk_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher_head: Tensor | None
        self.register_buffer("teacher_head", teacher_head, persistent=False)
        self.vocab = vocab
        self.weights = LossWeights(args.ce_weight, args.kl_weight, args.temperature)
        self.chunk_tokens = args.loss_chunk_tokens or chunk_tokens
        device = student.backbone.embedding.weight.device
        self.compiled = args.compile or compiles_loss(device)

    def forward(self, batch: Batch, teacher_signal: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the loss to descend, and its figures for a `Meter`, (4,).

        batch of (B, S); teacher_signal: hidden states (B, S, D_t), logits (B, S, vocab), or None.
        """
        inputs = self.loss_inputs(batch, teacher_signal)
        if self.chunk_tokens is None:  # once: what is free varies from step to step, and with it the rounding
            self.chunk_tokens = choose_chunk_tokens(
                self.vocab, inputs.student_hidden.dtype, inputs.student_hidden.device
            )
            logger.info("the loss takes %d tokens at a time", self.chunk_tokens)
        total, kl, ce, n_ignored = fused_distill_loss(inputs, self.weights, self.chunk_tokens, self.compiled)
        return total, torch.stack([total, kl, ce, n_ignored]).detach().float()

    def loss_inputs(self, batch: Batch, teacher_signal: Tensor | None) -> LossInputs:
        """Runs the student's backbone, and collects what the loss of the batch needs."""
        hidden = self.student.backbone(batch.input_ids, use_cache=False).last_hidden_state  # (B, S, D)
        head = self.student.lm_head
        teacher = (teacher_signal, self.teacher_head)
        return LossInputs(hidden, head.weight, head.bias, *teacher, batch.labels, batch.loss_mask, self.vocab)


def compiles_loss(device: torch.device) -> bool:
    """Returns whether the loss is compiled even without --compile: on GPUs. A CPU takes rows that fit its cache."""
    return device.type == "cuda" and can_compile(device.type)


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


def build_schedule(optimizer: torch.optim.Optimizer, args: TrainArguments, total_steps: int, done: int) -> LRScheduler:
    """Returns the schedule warm-up, stable, decay over `total_steps` optimizer steps, of which `done` are done."""
    for group in optimizer.param_groups:
        group["initial_lr"] = args.max_lr * group.get("lr_factor", 1.0)
    return get_wsd_schedule(
        optimizer,
        num_warmup_steps=round(args.warmup_ratio * total_steps) if args.warmup_steps is None else args.warmup_steps,
        num_decay_steps=round(args.decay_ratio * total_steps),
        num_training_steps=total_steps,
        decay_type="linear",
        min_lr_ratio=args.min_lr / args.max_lr if args.max_lr else 0.0,
        last_epoch=done - 1,
    )


class Update(NamedTuple):
    """Says what became of one optimizer step, the same on all ranks."""

    means: dict[str, float]  # of a Meter
    lr: float  # of the mixers
    grad_norm: float  # before clipping
    outcome: Outcome
    loss_scale: dict[str, Any]  # after the update
    micro_steps: int
    tokens: int  # of all ranks


@dataclass(frozen=True)
class Learner:
    """Holds what learns: the student with its loss under DDP, what moves its weights, and the lane to the teacher."""

    model: DistributedDataParallel
    optimizer: ZeroRedundancyOptimizer
    schedule: LRScheduler
    loss_scale: LossScale
    lane: Lane
    total_steps: int  # optimizer steps of the whole run
    accumulate: int  # micro steps of each
    tokens_per_step: int  # of all ranks
    grad_clip: float

    @property
    def student(self) -> LlambaForCausalLM:
        return self.model.module.student

    def micro_step(self, batch: Batch, teacher_signal: Tensor | None, is_last: bool) -> Tensor:
        """Runs forward and backward on a batch; ranks sum their gradients in the last micro step of an optimizer step.
        Returns the loss and its figures, (4,), for a `Meter`.
        """
        with contextlib.nullcontext() if is_last else self.model.no_sync():
            loss, figures = self.model(batch, teacher_signal)
            (loss * (self.loss_scale.value / self.accumulate)).backward()
        return figures

    def update(self, means: dict[str, float]) -> Update:
        """Steps optimizer and schedule. means: of the `Meter` that saw the micro steps."""
        lr = float(self.schedule.get_last_lr()[0])
        grad_norm, outcome = step_or_skip(self.model, self.optimizer, self.loss_scale, self.grad_clip, means["loss"])
        self.schedule.step()
        loss_scale = dataclasses.asdict(self.loss_scale)
        return Update(means, lr, grad_norm, outcome, loss_scale, self.accumulate, self.tokens_per_step)


def build_learner(
    job: Job,
    model: DistillationModel,
    lane: Lane,
    total_steps: int,
    steps_done: int = 0,
    loss_scale: dict[str, Any] | None = None,
) -> Learner:
    """Returns the learner of a run of `total_steps` optimizer steps, of which `steps_done` are done; `loss_scale` is
    that of the checkpoint, if there is one.
    """
    args = job.args
    ddp = wrap_ddp(model, job.ranks.device)
    settings = (args.max_lr, args.weight_decay, args.master_weights, args.copied_lr_factor)
    optimizer = build_optimizer(ddp, *settings)
    return Learner(
        model=ddp,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, args, total_steps, steps_done),
        loss_scale=LossScale(**loss_scale) if loss_scale else LossScale.for_dtype(DTYPES[args.dtype]),
        lane=lane,
        total_steps=total_steps,
        accumulate=args.grad_accumulation_steps,
        tokens_per_step=args.grad_accumulation_steps * job.ranks.world_size * args.batch_size * args.seq_length,
        grad_clip=args.grad_clip,
    )


def wrap_ddp(model: DistillationModel, device: torch.device) -> DistributedDataParallel:
    """Returns the model under DDP, on the rank's own device."""
    with warnings.catch_warnings():
        # torch 2.13 deprecates the name; its successor is not known to torch 2.11.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def settle_buckets(model: DistributedDataParallel, shape: tuple[int, int]) -> None:
    """Makes DDP arrange its buckets for good. Without this, a resumed run of three ranks differs in the last bits: DDP
    rearranges its buckets in the forward pass after the first backward pass, and the order in which gradients are
    summed depends on them. Takes two passes over made-up tokens of `shape` (B, S); weights and random state stay as
    they are.
    """
    inner: DistillationModel = model.module
    weight = inner.student.lm_head.weight
    ids = torch.zeros(shape, dtype=torch.int64, device=weight.device)
    signal = None
    if inner.weights.kl_weight > 0:
        width = inner.vocab if inner.teacher_head is None else inner.teacher_head.shape[1]
        signal = torch.zeros(*shape, width, dtype=weight.dtype, device=weight.device)
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        for _ in range(2):
            loss, _ = model(Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool)), signal)
            (loss * 0).backward()
    model.zero_grad(set_to_none=False)


def owned_parameters(
    student: LlambaForCausalLM, optimizer: ZeroRedundancyOptimizer
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields name and parameter of those whose masters and moments are kept on this rank."""
    names = {parameter: name for name, parameter in student.named_parameters()}
    for group in optimizer.optim.param_groups:
        for parameter in group["params"]:
            yield names[parameter], parameter


class Meter:
    """Collects what a rank sees in the micro steps of one optimizer step; `means` averages it over all ranks."""

    NAMES = ("loss", "kl", "ce", "ignored_labels")

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Sequence[int]]] = []

    def add(self, figures: Tensor, window_ids: Sequence[int]) -> None:
        """Adds a micro step. figures (4,): as `DistillationModel` returns them; window_ids: of its batch."""
        self.seen.append((figures, window_ids))

    @property
    def n_micro_steps(self) -> int:
        return len(self.seen)

    def means(self, **seconds: float) -> dict[str, float]:
        """Returns the means over ranks: of losses per micro step, of counts and of this rank's `seconds` per optimizer
        step. All ranks get the same; what is not finite on one of them is not finite in the mean.
        """
        sums = torch.stack([figures for figures, _ in self.seen]).sum(dim=0)  # (4,)
        sums = torch.cat([sums, sums.new_tensor(list(seconds.values()))])
        dist.all_reduce(sums)
        values = [value / dist.get_world_size() for value in sums.tolist()]
        means = dict(zip([*self.NAMES, *seconds], values, strict=True))
        for name in ("loss", "kl", "ce"):
            means[name] /= len(self.seen)
        return means

    def windows(self, only_bad: bool = False) -> list[int]:
        """Returns the ids of this rank's windows; with `only_bad`, those of micro steps whose loss is not finite."""
        return [i for figures, ids in self.seen if not only_bad or not math.isfinite(figures[0].item()) for i in ids]

    def clear(self) -> None:
        self.seen.clear()


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Returns the batch with its tensors on `device`; from pinned memory the copies run beside the host."""
    return batch.with_tensors(lambda tensor: tensor.to(device, non_blocking=True))
