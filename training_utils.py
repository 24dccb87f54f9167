"""The student with its loss as one module for DDP, DDP's buckets settled before the first step, and the `Meter` that
takes the means of what the module returns over micro steps and ranks.
"""

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from arguments import TrainArguments
from data import Batch
from distillation.losses import choose_chunk_tokens, fused_distill_loss, mask_unknown_labels
from distillation.losses import (
    compute_distill_loss as compute_distill_loss,  # users of the original layout look for it here
)
from llamba import LlambaForCausalLM
from utils import can_compile

logger = logging.getLogger("train")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
