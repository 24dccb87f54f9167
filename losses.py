"""Distillation losses as pure functions of tensors: float32 inside (float64 for float64), explicit masks, means
over the unmasked tokens. `compute_distill_loss` is the readable reference; `fused_distill_loss` is the same from
hidden states and heads, and never holds the logits of more than a chunk of tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits of one chunk: 128 MiB in float32, several times that with what is made of them.
LOGITS_PER_CHUNK = 2**25


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
) -> tuple[Tensor, Tensor, Tensor]:
    """`compute_distill_loss` in chunks of tokens: each chunk's logits give its loss and at once its gradients, so
    that nothing of size tokens x vocabulary is ever made. Over N tokens, of any leading shape (...):

    student_hidden (..., D), student_head (V_s, D), student_bias (V_s,) or None; teacher: its hidden states
    (..., D_t) with teacher_head (vocab, D_t), its logits (..., vocab) with None, or None without a teacher;
    labels, loss_mask (...). Softmax runs over the first `vocab` entries.

    Returns (total, kl, ce) as `compute_distill_loss`; gradients of `total` alone reach student_hidden, student_head
    and student_bias, those of the head summed in float32.
    """
    if chunk_tokens is None:
        chunk_tokens = max(1, LOGITS_PER_CHUNK // vocab)
    total, kl, ce = _FusedDistillLoss.apply(
        student_hidden.flatten(0, -2),
        student_head,
        student_bias,
        None if teacher is None else teacher.flatten(0, -2),
        teacher_head,
        labels.flatten(),
        loss_mask.flatten().bool(),
        (vocab, ce_weight, kl_weight, temperature, chunk_tokens),
    )
    return total, kl, ce


class _FusedDistillLoss(torch.autograd.Function):
    """Forward finds the gradients of the summed loss; backward divides by the tokens and scales. In float16 small
    gradients would otherwise vanish before the loss scale reaches them.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden, head, bias, teacher, teacher_head, labels, loss_mask, settings
    ) -> tuple[Tensor, Tensor, Tensor]:
        vocab, ce_weight, kl_weight, temperature, chunk_tokens = settings
        loss_mask, _ = mask_unknown_labels(labels, loss_mask, vocab)
        labels = labels.masked_fill(~loss_mask, 0)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        kl = ce = torch.zeros((), dtype=dtype, device=hidden.device)
        wants_hidden, wants_head, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if wants_hidden else None
        d_head = torch.zeros(head.shape, dtype=dtype, device=head.device) if wants_head else None
        d_bias = torch.zeros(head.shape[0], dtype=dtype, device=head.device) if wants_bias else None
        head = head[:vocab]

        for start in range(0, hidden.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = F.linear(hidden[chunk], head, None if bias is None else bias[:vocab]).to(dtype)  # (n, vocab)
            teacher_logits = None
            if teacher is not None:
                teacher_logits = teacher[chunk] if teacher_head is None else teacher[chunk] @ teacher_head.T
                teacher_logits = teacher_logits.to(dtype)  # (n, vocab)
            chunk_kl, chunk_ce, d_logits = _chunk_losses(
                logits, teacher_logits, labels[chunk], loss_mask[chunk], ce_weight, kl_weight, temperature
            )
            kl, ce = kl + chunk_kl, ce + chunk_ce
            if d_bias is not None:
                d_bias[:vocab] += d_logits.sum(0)
            d_logits = d_logits.to(head.dtype)
            if d_hidden is not None:
                d_hidden[chunk] = d_logits @ head
            if d_head is not None:
                d_head[:vocab] += d_logits.T @ hidden[chunk]

        n_tokens = loss_mask.sum().clamp_min(1)
        kl, ce = kl / n_tokens, ce / n_tokens
        ctx.gradients, ctx.n_tokens, ctx.dtype = (d_hidden, d_head, d_bias), n_tokens, hidden.dtype
        ctx.mark_non_differentiable(kl, ce)
        return ce_weight * ce + kl_weight * kl, kl, ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total, *_) -> tuple[Tensor | None, ...]:
        factor = d_total / ctx.n_tokens
        gradients = [None if d is None else (d.mul_(factor)).to(ctx.dtype) for d in ctx.gradients]
        return (*gradients, None, None, None, None, None)


def _chunk_losses(
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor,
    ce_weight: float,
    kl_weight: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of KL (times T^2) and CE over a chunk's unmasked tokens, and the gradient of their weighted sum by the
    logits (n, V): ce_weight (p - onehot) + kl_weight T (p_T - q_T), p and q the student's and teacher's softmax.
    """
    log_p = F.log_softmax(logits, dim=-1)  # (n, V)
    label_log_p = log_p.gather(1, labels[:, None])  # (n, 1)
    d_logits = log_p.exp().mul_(ce_weight)
    d_logits.scatter_add_(1, labels[:, None], torch.full_like(label_log_p, -ce_weight))
    ce = -(label_log_p[:, 0] * loss_mask).sum()
    kl = torch.zeros_like(ce)
    if teacher_logits is not None:
        log_p_T = log_p if temperature == 1 else F.log_softmax(logits / temperature, dim=-1)
        log_q_T = F.log_softmax(teacher_logits / temperature, dim=-1)
        q_T = log_q_T.exp()
        kl = temperature**2 * ((q_T * (log_q_T - log_p_T)).sum(-1) * loss_mask).sum()
        d_logits += (log_p_T.exp() - q_T).mul_(kl_weight * temperature)
    return kl, ce, d_logits.mul_(loss_mask[:, None])
