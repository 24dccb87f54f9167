"""The student with its loss as one module for DDP, DDP's buckets settled before the first step, and the `Meter` that
takes the means of what the module returns over micro steps and ranks.
"""

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_wsd_schedule

from arguments import TrainArguments
from distillation.adamw import MasterWeightAdamW
from distillation.losses import choose_chunk_tokens, fused_distill_loss, mask_unknown_labels
from distillation.losses import (
    compute_distill_loss as compute_distill_loss,  # users of the original layout look for it here
)
from llamba import LlambaForCausalLM
from model_utils import DTYPES
from processes.devices import can_compile
from text.batch import Batch

logger = logging.getLogger("train")


class DistillationModel(nn.Module):
    """The student with its loss, so that DDP sees one module from tokens to scalars.

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
        self.weights = (args.ce_weight, args.kl_weight, args.temperature)
        self.chunk_tokens = args.loss_chunk_tokens or chunk_tokens
        device = student.backbone.embedding.weight.device
        self.compiled = args.compile or compiles_loss(device)

    def forward(self, batch: Batch, teacher_signal: Tensor | None) -> tuple[Tensor, Tensor]:
        """batch of (B, S); teacher_signal: hidden states (B, S, D_t), logits (B, S, vocab), or None.

        Returns the loss to descend, and its figures for a `Meter`.
        """
        hidden = self.student.backbone(batch.input_ids, use_cache=False).last_hidden_state  # (B, S, D)
        head = self.student.lm_head
        if self.chunk_tokens is None:  # once: what is free varies from step to step, and with it the rounding
            self.chunk_tokens = choose_chunk_tokens(self.vocab, hidden.dtype, hidden.device)
            logger.info("the loss takes %d tokens at a time", self.chunk_tokens)
        total, kl, ce = fused_distill_loss(
            hidden,
            head.weight,
            head.bias,
            teacher_signal,
            self.teacher_head,
            batch.labels,
            batch.loss_mask,
            self.vocab,
            *self.weights,
            self.chunk_tokens,
            self.compiled,
        )
        _, n_ignored = mask_unknown_labels(batch.labels, batch.loss_mask, self.vocab)
        return total, torch.stack([total, kl, ce, n_ignored]).detach().float()


def compiles_loss(device: torch.device) -> bool:
    """Whether the loss is compiled unasked: on GPUs. A CPU takes it in rows that stay in its cache instead."""
    return device.type == "cuda" and can_compile(device.type)


class Meter:
    """What a rank sees in the micro steps of one optimizer step; `mean` is their average over all ranks."""

    NAMES = ("loss", "kl", "ce", "ignored_labels")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seen: list[tuple[Tensor, Sequence[int]]] = []

    def add(self, figures: Tensor, window_ids: Sequence[int]) -> None:
        """figures (4,): as `DistillationModel` returns them; window_ids: of the batch that gave them."""
        self.seen.append((figures, window_ids))

    def mean(self, **seconds: float) -> dict[str, float]:
        """Per micro step for the losses, per optimizer step for counts and for `seconds`, this rank's own. All ranks
        get the same means; what is not finite on one of them is not finite in the mean.
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
        """Ids of this rank's windows; with `only_bad` of the micro steps alone whose loss is not finite."""
        return [i for figures, ids in self.seen if not only_bad or not math.isfinite(figures[0].item()) for i in ids]

    def clear(self) -> None:
        self.seen.clear()


@contextlib.contextmanager
def undisturbed(student: LlambaForCausalLM, compiled: bool) -> Iterator[None]:
    """A look at the student in training: without dropout and gradients, and not compiled anew for that; afterwards it
    is as it was.
    """
    student.eval()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        student.train()


def wrap_ddp(model: DistillationModel, device: torch.device) -> DistributedDataParallel:
    with warnings.catch_warnings():
        # torch 2.13 deprecates the name; its successor is not known to torch 2.11.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def settle_buckets(model: DistributedDataParallel, args: TrainArguments, device: torch.device) -> None:
    """Has DDP arrange its buckets for good, which it does in the forward pass after the first backward pass. The order
    in which ranks are summed up, and so the last bit of a gradient, depends on them: a run that goes on must not begin
    with other buckets than it had. Two passes over made-up tokens; weights and random state are left as they were.
    """
    shape = (args.batch_size, args.seq_length)  # the real one: another would be compiled for, too
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    signal, inner = None, model.module
    if args.kl_weight > 0:
        width = inner.vocab if inner.teacher_head is None else inner.teacher_head.shape[1]
        signal = torch.zeros(*shape, width, dtype=DTYPES[args.dtype], device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(2):
            loss, _ = model(Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool)), signal)
            (loss * 0).backward()
    model.zero_grad(set_to_none=False)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return batch.with_tensors(lambda tensor: tensor.to(device, non_blocking=True))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters: matrices decay, vectors (norms, biases, D) do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, args: TrainArguments) -> ZeroRedundancyOptimizer:
    """AdamW (0.9, 0.95) whose masters and moments are kept on the one rank that owns the shard."""
    return ZeroRedundancyOptimizer(
        parameter_groups(model, args.weight_decay),
        optimizer_class=MasterWeightAdamW,
        lr=args.max_lr,
        betas=(0.9, 0.95),
        master_weights=args.master_weights,
    )


def build_schedule(optimizer: torch.optim.Optimizer, args: TrainArguments, total_steps: int, done: int) -> LRScheduler:
    """Warm-up, stable, decay over `total_steps` optimizer steps, of which `done` are behind."""
    for group in optimizer.param_groups:
        group["initial_lr"] = args.max_lr
    return get_wsd_schedule(
        optimizer,
        num_warmup_steps=round(args.warmup_ratio * total_steps),
        num_decay_steps=round(args.decay_ratio * total_steps),
        num_training_steps=total_steps,
        decay_type="linear",
        min_lr_ratio=args.min_lr / args.max_lr if args.max_lr else 0.0,
        last_epoch=done - 1,
    )


@dataclass
class LossScale:
    """The factor that keeps float16 gradients from vanishing: halved when they overflow, doubled after
    `growth_interval` good steps. For other dtypes it is 1 for good.
    """

    active: bool
    value: float
    good_steps: int = 0
    growth_interval: int = 1000

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> "LossScale":
        return cls(True, 2.0**14) if dtype == torch.float16 else cls(False, 1.0)

    def update(self, overflowed: bool) -> None:
        if not self.active:
            return
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps % self.growth_interval == 0:
            self.value *= 2


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """L2 norm of all gradients, in float32 whatever their dtype: a scalar tensor."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in model.parameters() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_scale: LossScale, grad_clip: float, loss: float
) -> tuple[float, Literal["stepped", "overflow", "bad"]]:
    """Unscale, clip, step, clear the gradients. Returns the gradient norm before clipping, and what came of it.

    `loss` is the mean of all ranks, and DDP has made the gradients, and so the norm, the same on all of them: they
    agree without asking whether a step is sound. If one of the two is not finite the update is skipped: an "overflow"
    if float16's scale can be blamed, else a "bad" step.
    """
    norm = gradient_norm(model).item() / loss_scale.value
    outcome: Literal["stepped", "overflow", "bad"] = "stepped"
    if not math.isfinite(loss) or not math.isfinite(norm):
        outcome = "overflow" if math.isfinite(loss) and loss_scale.value > 1 else "bad"
    else:
        factor = 1.0 / loss_scale.value
        if grad_clip and norm > grad_clip:
            factor *= grad_clip / norm
        for group in optimizer.param_groups:
            group["grad_factor"] = factor
        optimizer.step()
    loss_scale.update(overflowed=outcome == "overflow")
    # Kept as zeros: a gradient that is None gathers outside DDP's buckets until micro steps are summed up.
    optimizer.zero_grad(set_to_none=False)
    return norm, outcome


def owned_parameters(
    student: LlambaForCausalLM, optimizer: ZeroRedundancyOptimizer
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Those whose masters and moments are kept on this rank, with their names."""
    names = {parameter: name for name, parameter in student.named_parameters()}
    for group in optimizer.optim.param_groups:
        for parameter in group["params"]:
            yield names[parameter], parameter
