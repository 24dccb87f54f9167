"""The distillation loss in chunks of tokens: each chunk's logits give its loss and at once its gradients, so that
nothing of size tokens x vocabulary ever exists. Equals `losses.compute_distill_loss`.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distillation.losses import LossInputs, LossWeights, mask_unknown_labels

logger = logging.getLogger("train")

ChunkLosses = Callable[..., tuple[Tensor, Tensor]]  # with the arguments and results of `_chunk_losses`

# Bytes of a chunk's logits in float32, the student's and the teacher's: on the CPU the first figure, on a GPU up to the
# second and an eighth of what is free. Smaller chunks read the heads more often; larger ones gain nothing.
CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES = 2**28, 2**30
# Logits that stay in a CPU's cache from one pass over them to the next.
CACHED_LOGITS = 2**21


def fused_distill_loss(
    inputs: LossInputs, weights: LossWeights, chunk_tokens: int | None = None, compiled: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes `compute_distill_loss` from hidden states and heads, a chunk of tokens at a time.

    chunk_tokens: tokens of a chunk (default: `choose_chunk_tokens`). compiled: fuses what is done to the logits with
    torch.compile.

    Returns total, kl and ce as `compute_distill_loss`, and how many unmasked labels were unknown; scalar tensors.
    Gradients of total alone reach student_hidden, student_head and student_bias; the head's is summed in float32.
    """
    loss_mask, n_unknown = mask_unknown_labels(inputs.labels, inputs.loss_mask.bool(), inputs.vocab)
    if chunk_tokens is None:
        chunk_tokens = choose_chunk_tokens(inputs.vocab, inputs.student_hidden.dtype, inputs.student_hidden.device)
    total, kl, ce = _FusedDistillLoss.apply(
        inputs.student_hidden.flatten(0, -2),
        inputs.student_head,
        inputs.student_bias,
        None if inputs.teacher is None else inputs.teacher.flatten(0, -2),
        inputs.teacher_head,
        inputs.labels.masked_fill(~loss_mask, 0).flatten(),
        loss_mask.flatten(),
        (inputs.vocab, weights, chunk_tokens, compiled),
    )
    return total, kl, ce, n_unknown


def choose_chunk_tokens(vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Returns how many tokens a chunk may have by the memory that is free, a power of two."""
    budget = CPU_CHUNK_BYTES
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        budget = min(CUDA_CHUNK_BYTES, (free + cached) // 8)
    tokens = budget // (2 * vocab * max(dtype.itemsize, 4))
    return 2 ** max(0, tokens.bit_length() - 1)


class _FusedDistillLoss(torch.autograd.Function):
    """Computes the gradients of the summed loss in forward; backward divides them by the tokens and scales them.
    Divided before, small ones would vanish in float16 before the loss scale reaches them.
    """

    @staticmethod
    def forward(ctx: Any, hidden, head, bias, *constants) -> tuple[Tensor, Tensor, Tensor]:
        teacher, teacher_head, labels, loss_mask, (vocab, weights, chunk_tokens, compiled) = constants
        losses_of: ChunkLosses = _compiled_chunk_losses() if compiled else _chunk_losses
        if not hidden.is_cuda:
            losses_of = functools.partial(_rows_in_cache, losses_of)
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
            d_logits, chunk_sums = losses_of(logits, teacher_logits, labels_chunk, label_logits, mask_chunk, weights)
            sums += chunk_sums
            if d_bias is not None:
                d_bias[:vocab] += d_logits.sum(0, dtype=dtype)
            if d_hidden is not None:
                add_product(d_hidden[chunk], d_logits, head)
            if d_head is not None:
                add_product(d_head[:vocab], d_logits.T, hidden[chunk])

        n_learned = loss_mask.sum().clamp_min(1)
        kl, ce = (sums / n_learned).unbind()
        ctx.gradients, ctx.n_learned, ctx.dtype = (d_hidden, d_head, d_bias), n_learned, hidden.dtype
        ctx.mark_non_differentiable(kl, ce)
        return weights.ce_weight * ce + weights.kl_weight * kl, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total, *_) -> tuple[Tensor | None, ...]:
        factor = d_total / ctx.n_learned
        gradients, ctx.gradients = ctx.gradients, None  # the loss may live on; what is as large as the head must not
        gradients = [None if d is None else d.mul_(factor).to(ctx.dtype) for d in gradients]
        return (*gradients, None, None, None, None, None)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Computes F.linear into `out`."""
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a (m, n) b (n, k) to total (m, k), in total's float32 where a and b have 16 bits."""
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
    weights: LossWeights,
) -> tuple[Tensor, Tensor]:
    """Returns the gradient by logits (n, V) of the weighted sum of CE and KL (times T^2) over a chunk's unmasked
    tokens, ce_weight (p - onehot) + kl_weight T (p_T - q_T), p and q the softmax of student and teacher; and the sums
    of KL and of CE, (2,). All in place, in float32 or better: logits are overwritten by the gradient, teacher_logits
    (n, V) too.

    label_logits (n,) are the labels' own, not rounded: rounding to 16 bits averages out in the normaliser, which sums
    over the vocabulary, but not in this single logit.
    """
    ce_weight, kl_weight, temperature = weights
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
    return logits.copy_(d_logits), torch.stack([(kl * loss_mask).sum(), (ce * loss_mask).sum()])


def _chunk_losses_to_fuse(
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    label_logits: Tensor,
    loss_mask: Tensor,
    weights: LossWeights,
) -> tuple[Tensor, Tensor]:
    """Computes `_chunk_losses` in the form of which torch.compile makes one kernel over (n, V) on a GPU. It reads the
    logits twice and writes their gradient once, to a new tensor; the inputs stay. The form above has logits gathered,
    scattered and overwritten, for which that kernel would be cut in three, with float32 (n, V) written in between.
    """
    ce_weight, kl_weight, temperature = weights
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scores = logits.to(dtype)  # (n, V)
    log_normaliser = _log_normaliser(scores)  # (n, 1)
    log_p = scores - log_normaliser
    p = log_p.exp()
    ce = log_normaliser[:, 0] - label_logits  # (n,)
    is_label = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]  # (n, V)
    d_logits = ce_weight * torch.where(is_label, p - 1, p)
    kl = torch.zeros_like(ce)
    if teacher_logits is not None:
        log_p_T, p_T, teacher_scores = log_p, p, teacher_logits.to(dtype)
        if temperature != 1:
            scores, teacher_scores = scores / temperature, teacher_scores / temperature
            log_p_T = scores - _log_normaliser(scores)
            p_T = log_p_T.exp()
        log_q_T = teacher_scores - _log_normaliser(teacher_scores)
        q_T = log_q_T.exp()
        kl = temperature**2 * (q_T * (log_q_T - log_p_T)).sum(-1)  # (n,)
        d_logits = d_logits + kl_weight * temperature * (p_T - q_T)
    d_logits = (d_logits * loss_mask[:, None]).to(logits.dtype)
    return d_logits, torch.stack([(kl * loss_mask).sum(), (ce * loss_mask).sum()])


def _log_normaliser(scores: Tensor) -> Tensor:
    """Returns log sum exp of scores (n, V), (n, 1), in operations that Inductor knows for a softmax."""
    largest = scores.amax(-1, keepdim=True)
    return largest + (scores - largest).exp().sum(-1, keepdim=True).log()


def _rows_in_cache(
    losses_of: ChunkLosses,
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    label_logits: Tensor,
    loss_mask: Tensor,
    weights: LossWeights,
) -> tuple[Tensor, Tensor]:
    """Calls `losses_of` for as many rows at a time as stay in a CPU's cache, and sums its sums. Logits are overwritten
    by their gradient.
    """
    n_rows = max(1, CACHED_LOGITS // logits.shape[1])
    sums = []
    for start in range(0, logits.shape[0], n_rows):
        rows = slice(start, start + n_rows)
        teacher_rows = None if teacher_logits is None else teacher_logits[rows]
        row_logits = logits[rows]
        d_logits, row_sums = losses_of(
            row_logits, teacher_rows, labels[rows], label_logits[rows], loss_mask[rows], weights
        )
        row_logits.copy_(d_logits)
        sums.append(row_sums)
    return logits, torch.stack(sums).sum(0)


class _CompiledChunkLosses:
    """Runs `_chunk_losses_to_fuse` under torch.compile. If the compiler fails, or the first launch of what it made, the
    plain form takes over: a run of days must not end at its first step for lack of some speed.
    """

    def __init__(self) -> None:
        self.losses_of: ChunkLosses = torch.compile(_chunk_losses_to_fuse)
        self.tried: set[tuple[int, ...]] = set()  # shapes of logits

    def __call__(self, logits: Tensor, *rest) -> tuple[Tensor, Tensor]:
        if self.losses_of is not _chunk_losses and tuple(logits.shape) not in self.tried:
            self._try(logits, *rest)
            self.tried.add(tuple(logits.shape))
        return self.losses_of(logits, *rest)

    def _try(self, *args) -> None:
        """Runs the compiled form, which leaves its inputs as they are."""
        try:
            self.losses_of(*args)
        except torch.OutOfMemoryError:
            raise  # the plain form takes more
        except Exception as error:  # of the compiler or of Triton's launch, whose errors have no common class
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            logger.warning("the loss cannot be compiled and runs slower: %s", reason)
            self.losses_of = _chunk_losses


_compiled_chunk_losses = functools.cache(_CompiledChunkLosses)
