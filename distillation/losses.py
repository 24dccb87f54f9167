"""Distillation losses as pure functions of tensors: float32 inside (float64 for float64), explicit masks, means
over the unmasked tokens. `compute_distill_loss` is the readable reference; `fused_distill_loss` is the same from
hidden states and heads, and never holds the logits of more than a chunk of tokens.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.function import once_differentiable

logger = logging.getLogger("train")

ChunkLosses = Callable[..., Tensor]  # with the arguments and results of `_chunk_losses`

# Bytes of a chunk's logits in float32, the student's and the teacher's: on the CPU the first figure, on a GPU up to the
# second and an eighth of what is free. Smaller chunks read the heads more often; larger ones gain nothing.
CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES = 2**28, 2**30
# Logits that stay in a CPU's cache from one pass over them to the next.
CACHED_LOGITS = 2**21


def shared_vocab(student_vocab: int, teacher_vocab: int) -> int:
    """Entries that both vocabularies have: the losses' softmax runs over these and no others."""
    return min(student_vocab, teacher_vocab)


def mask_unknown_labels(labels: Tensor, loss_mask: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Labels (B, S) outside 0..vocab-1 cannot be learned. Returns the mask (B, S) without them, and how many of
    the unmasked tokens they were (a scalar tensor; reading it waits for the device).
    """
    known = (labels >= 0) & (labels < vocab)
    return loss_mask & known, (loss_mask & ~known).sum()


def compute_distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    ce_weight: float,
    kl_weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """ce_weight * CE + kl_weight * T^2 * KL(teacher || student), T^2 as in Hinton et al. (arXiv 1503.02531).

    student_logits (B, S, V_s), teacher_logits (B, S, V_t) or None (then kl is 0); labels, loss_mask (B, S).
    Softmax runs over the first min(V_s, V_t) entries; labels outside them are left out. Means over unmasked
    tokens, 0 where there are none. Returns (total, kl, ce), scalars: kl is T^2 times the mean KL at temperature T,
    ce the mean cross entropy at temperature 1; neither has its weight.
    """
    vocab = student_logits.shape[-1]
    if teacher_logits is not None:
        vocab = shared_vocab(vocab, teacher_logits.shape[-1])
    loss_mask, _ = mask_unknown_labels(labels, loss_mask.bool(), vocab)
    n_tokens = loss_mask.sum().clamp_min(1)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student = student_logits[..., :vocab].to(dtype)  # (B, S, V)

    token_ce = F.cross_entropy(
        student.flatten(0, 1), labels.masked_fill(~loss_mask, -100).flatten(), reduction="none"
    ).view_as(labels)  # (B, S)
    ce = (token_ce * loss_mask).sum() / n_tokens

    kl = torch.zeros_like(ce)
    if teacher_logits is not None:
        student_log_p = F.log_softmax(student / temperature, dim=-1)
        teacher_log_p = F.log_softmax(teacher_logits[..., :vocab].to(dtype) / temperature, dim=-1)
        token_kl = (teacher_log_p.exp() * (teacher_log_p - student_log_p)).sum(-1)  # (B, S)
        kl = temperature**2 * (token_kl * loss_mask).sum() / n_tokens
    return ce_weight * ce + kl_weight * kl, kl, ce


def fused_distill_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    vocab: int,
    ce_weight: float,
    kl_weight: float,
    temperature: float,
    chunk_tokens: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`compute_distill_loss` in chunks of tokens: each chunk's logits give its loss and at once its gradients, so
    that nothing of size tokens x vocabulary is ever made. Over N tokens, of any leading shape (...):

    student_hidden (..., D), student_head (V_s, D), student_bias (V_s,) or None; teacher: its hidden states
    (..., D_t) with teacher_head (vocab, D_t), its logits (..., vocab) with None, or None without a teacher;
    labels, loss_mask (...). Softmax runs over the first `vocab` entries.
    chunk_tokens: tokens per chunk (default: `choose_chunk_tokens`).
    compiled: fuse what is done to the logits with torch.compile.

    Returns (total, kl, ce) as `compute_distill_loss`; gradients of `total` alone reach student_hidden, student_head
    and student_bias, those of the head summed in float32.
    """
    if chunk_tokens is None:
        chunk_tokens = choose_chunk_tokens(vocab, student_hidden.dtype, student_hidden.device)
    total, kl, ce = _FusedDistillLoss.apply(
        student_hidden.flatten(0, -2),
        student_head,
        student_bias,
        None if teacher is None else teacher.flatten(0, -2),
        teacher_head,
        labels.flatten(),
        loss_mask.flatten().bool(),
        (vocab, ce_weight, kl_weight, temperature, chunk_tokens, compiled),
    )
    return total, kl, ce


def choose_chunk_tokens(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens per chunk, a power of two."""
    budget = CPU_CHUNK_BYTES
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = min(CUDA_CHUNK_BYTES, (free + cached) // 8)
    tokens = budget // (2 * vocab * max(dtype.itemsize, 4))
    return 2 ** max(0, tokens.bit_length() - 1)


class _FusedDistillLoss(torch.autograd.Function):
    """Forward finds the gradients of the summed loss; backward divides by the tokens and scales. In float16 small
    gradients would otherwise vanish before the loss scale reaches them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden, head, bias, teacher, teacher_head, labels, loss_mask, settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        vocab, ce_weight, kl_weight, temperature, chunk_tokens, compiled = settings
        losses_of: ChunkLosses = _compiled_chunk_losses() if compiled else _chunk_losses
        if not hidden.is_cuda:
            losses_of = functools.partial(_rows_in_cache, losses_of)
        loss_mask, _ = mask_unknown_labels(labels, loss_mask, vocab)
        labels = labels.masked_fill(~loss_mask, 0)
        n_tokens, dtype = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
        wants_hidden, wants_head, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = hidden.new_zeros(hidden.shape, dtype=dtype) if wants_hidden else None
        d_head = head.new_zeros(head.shape, dtype=dtype) if wants_head else None
        d_bias = head.new_zeros(head.shape[0], dtype=dtype) if wants_bias else None
        head, bias = head[:vocab], None if bias is None else bias[:vocab]
        sums = hidden.new_zeros(2, dtype=dtype)  # of KL and of CE
        # Fresh buffers of this size cost more than the arithmetic on them where the system has to clear their pages.
        logits_buffer = hidden.new_empty(min(chunk_tokens, n_tokens), vocab)
        teacher_buffer = None if teacher is None else torch.empty_like(logits_buffer)

        for start in range(0, n_tokens, chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            labels_chunk, mask_chunk = labels[chunk], loss_mask[chunk]  # (n,)
            n = labels_chunk.shape[0]
            logits = _linear(hidden[chunk], head, bias, out=logits_buffer[:n])  # (n, vocab)
            label_logits = (hidden[chunk].to(dtype) * head[labels_chunk].to(dtype)).sum(-1)  # (n,), not rounded
            if bias is not None:
                label_logits += bias[labels_chunk]
            teacher_logits = None
            if teacher_buffer is not None:
                teacher_logits = teacher_buffer[:n]  # (n, vocab)
                if teacher_head is None:
                    teacher_logits.copy_(teacher[chunk])
                else:
                    _linear(teacher[chunk], teacher_head, None, out=teacher_logits)
            sums += losses_of(
                logits, teacher_logits, labels_chunk, label_logits, mask_chunk, ce_weight, kl_weight, temperature
            )
            d_logits = logits  # what `losses_of` has made of them
            if d_bias is not None:
                d_bias[:vocab] += d_logits.sum(0, dtype=dtype)
            if d_hidden is not None:
                _add_product(d_hidden[chunk], d_logits, head)
            if d_head is not None:
                _add_product(d_head[:vocab], d_logits.T, hidden[chunk])

        n_learned = loss_mask.sum().clamp_min(1)
        kl, ce = (sums / n_learned).unbind()
        ctx.gradients, ctx.n_learned, ctx.dtype = (d_hidden, d_head, d_bias), n_learned, hidden.dtype
        ctx.mark_non_differentiable(kl, ce)
        return ce_weight * ce + kl_weight * kl, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total, *_) -> tuple[Tensor | None, ...]:
        factor = d_total / ctx.n_learned
        gradients, ctx.gradients = ctx.gradients, None  # the loss may live on; what is as large as the head must not
        gradients = [None if d is None else d.mul_(factor).to(ctx.dtype) for d in gradients]
        return (*gradients, None, None, None, None, None)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """F.linear into `out`."""
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (m, k) += a (m, n) b (n, k), in total's float32 where a and b have 16 bits."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # the CPU has no such product; factors widened as a whole would be as large as the head
        for columns, rows in zip(a.split(8192, dim=1), b.split(8192), strict=True):
            total.addmm_(columns.to(total.dtype), rows.to(total.dtype))


def _chunk_losses(
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    label_logits: Tensor,
    loss_mask: Tensor,
    ce_weight: float,
    kl_weight: float,
    temperature: float,
) -> Tensor:
    """Sums of KL (times T^2) and of CE over a chunk's unmasked tokens: (2,). logits (n, V) are overwritten by the
    gradient of the weighted sum, ce_weight (p - onehot) + kl_weight T (p_T - q_T), p and q the student's and
    teacher's softmax; teacher_logits (n, V) are used up. All in place, in float32 or better.

    label_logits (n,) are the labels' own, unrounded: what 16 bits lose of the vocabulary's logits averages out in the
    normaliser, and of the one logit beside it it does not.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(dtype)  # (n, V); the logits themselves where they are float32
    log_p_T = None if temperature == 1 else (scores / temperature).log_softmax(-1)
    labels = labels[:, None]  # (n, 1)
    rounded_logits = scores.gather(1, labels)
    log_p = torch.log_softmax(scores, -1, out=scores)
    log_normaliser = (rounded_logits - log_p.gather(1, labels))[:, 0]  # (n,)
    ce = log_normaliser - label_logits
    kl = torch.zeros_like(ce)
    if teacher_logits is None:
        d_logits = log_p.exp_().mul_(ce_weight)
    else:
        scores = teacher_logits.to(dtype)
        if temperature != 1:
            scores /= temperature
        log_q_T = torch.log_softmax(scores, -1, out=scores)
        q_T = log_q_T.exp()
        log_ratio = log_q_T.sub_(log_p if log_p_T is None else log_p_T)
        kl = temperature**2 * log_ratio.mul_(q_T).sum(-1)  # (n,)
        d_logits = log_p.exp_()
        if log_p_T is None:
            d_logits.mul_(ce_weight + kl_weight)
        else:
            d_logits.mul_(ce_weight).add_(log_p_T.exp_(), alpha=kl_weight * temperature)
        d_logits.add_(q_T, alpha=-kl_weight * temperature)
    d_logits.scatter_add_(1, labels, torch.full_like(rounded_logits, -ce_weight))
    d_logits.mul_(loss_mask[:, None])
    logits.copy_(d_logits)
    return torch.stack([(kl * loss_mask).sum(), (ce * loss_mask).sum()])


def _rows_in_cache(
    losses_of: ChunkLosses,
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    label_logits: Tensor,
    loss_mask: Tensor,
    *weights: float,
) -> Tensor:
    """What `losses_of` gives for all rows, from some at a time."""
    n_rows = max(1, CACHED_LOGITS // logits.shape[1])
    sums = []
    for start in range(0, logits.shape[0], n_rows):
        rows = slice(start, start + n_rows)
        teacher_rows = None if teacher_logits is None else teacher_logits[rows]
        sums.append(losses_of(logits[rows], teacher_rows, labels[rows], label_logits[rows], loss_mask[rows], *weights))
    return torch.stack(sums).sum(0)


class _CompiledChunkLosses:
    """`_chunk_losses` under torch.compile. Where the compiler fails, which it does before anything has run, the plain
    form takes over: a run of days must not end at its first step for want of some speed.
    """

    def __init__(self) -> None:
        self.losses_of: ChunkLosses = torch.compile(_chunk_losses)

    def __call__(self, *args) -> Tensor:
        try:
            return self.losses_of(*args)
        except TorchDynamoException as error:
            logger.warning("the loss cannot be compiled and goes on slower: %s", str(error).strip().splitlines()[0])
            self.losses_of = _chunk_losses
            return self.losses_of(*args)


_compiled_chunk_losses = functools.cache(_CompiledChunkLosses)
