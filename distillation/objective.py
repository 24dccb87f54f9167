"""What a distilled student learns from: text and the teacher's answers. The student with its loss is one module, under
DDP where that averages the gradients.
"""

import contextlib
import logging
import warnings

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from arguments import TrainArguments
from distillation.fused_loss import choose_chunk_tokens, fused_distill_loss
from distillation.losses import LossInputs, LossWeights
from distillation.teacher import PendingSignal
from llamba import LlambaForCausalLM
from processes.devices import can_compile
from text.batch import Batch

logger = logging.getLogger("train")


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
        total, kl, ce, n_ignored = fused_distill_loss(inputs, self.weights, self.chosen_chunk_tokens(), self.compiled)
        return total, torch.stack([total, kl, ce, n_ignored]).detach().float()

    def chosen_chunk_tokens(self) -> int:
        """Returns the tokens that the loss takes at a time, chosen once: what is free varies from step to step, and
        with it the rounding.
        """
        if self.chunk_tokens is None:
            weight = self.student.lm_head.weight
            self.chunk_tokens = choose_chunk_tokens(self.vocab, weight.dtype, weight.device)
            logger.info("the loss takes %d tokens at a time", self.chunk_tokens)
        return self.chunk_tokens

    def loss_inputs(self, batch: Batch, teacher_signal: Tensor | None) -> LossInputs:
        """Runs the student's backbone, and collects what the loss of the batch needs."""
        hidden = self.student.backbone(batch.input_ids, use_cache=False).last_hidden_state  # (B, S, D)
        head = self.student.lm_head
        teacher = (teacher_signal, self.teacher_head)
        return LossInputs(hidden, head.weight, head.bias, *teacher, batch.labels, batch.loss_mask, self.vocab)


def compiles_loss(device: torch.device) -> bool:
    """Returns whether the loss is compiled even without --compile: on GPUs. A CPU takes rows that fit its cache."""
    return device.type == "cuda" and can_compile(device.type)


class Distillation:
    """Is what a `Learner` descends in `--stage distil`: CE with the text, KL with the teacher, of the whole student."""

    def __init__(self, model: DistillationModel, device: torch.device, averages: bool = True) -> None:
        """device: of this rank. averages: whether DDP averages the gradients over ranks; else an exchange does."""
        self.model = model
        self.ddp = wrap_ddp(model, device) if averages else None

    def begin(self, shape: tuple[int, int]) -> None:
        """Brings the student to its first micro step of windows of `shape` (B, S)."""
        self.model.train()
        # In the run's own shape: torch.compile compiles for it here.
        settle_buckets(self.ddp or self.model, shape)

    def backward(self, batch: Batch, answer: PendingSignal, factor: float, is_last: bool) -> Tensor:
        """Adds the gradients of `factor` times the loss; DDP averages them over ranks if the micro step `is_last` of
        its optimizer step. Returns the figures, (4,): loss, KL, CE and ignored labels.
        """
        signal = answer.result()  # (B, S, D_t) or (B, S, vocab); None without a teacher
        with contextlib.nullcontext() if is_last or self.ddp is None else self.ddp.no_sync():
            loss, figures = (self.ddp or self.model)(batch, signal)
            (loss * factor).backward()
        return figures

    @staticmethod
    def named(sums: list[float], n_micro_steps: int) -> dict[str, float]:
        """Returns figures of an optimizer step by the names of metrics.jsonl: losses as means over its micro steps, of
        whose figures `sums` are the sums, and counts.
        """
        loss, kl, ce, ignored = sums
        losses = {"loss": loss, "kl": kl, "ce": ce}
        return {name: value / n_micro_steps for name, value in losses.items()} | {"ignored_labels": ignored}


def wrap_ddp(model: DistillationModel, device: torch.device) -> DistributedDataParallel:
    """Returns the model under DDP, on the rank's own device."""
    # Blocks are compiled one by one: DDP's optimizer for whole compiled models would cut each in pieces of its buckets.
    torch._dynamo.config.optimize_ddp = False
    with warnings.catch_warnings():
        # torch 2.13 deprecates the name; its successor is not known to torch 2.11.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def settle_buckets(model: DistributedDataParallel | DistillationModel, shape: tuple[int, int]) -> None:
    """Makes DDP arrange its buckets for good. Without this, a resumed run of three ranks differs in the last bits: DDP
    rearranges its buckets in the forward pass after the first backward pass, and the order in which gradients are
    summed depends on them. Takes two passes over made-up tokens of `shape` (B, S); weights and random state stay as
    they are.
    """
    inner: DistillationModel = model.module if isinstance(model, DistributedDataParallel) else model
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
