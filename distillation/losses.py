"""The distillation loss as a pure function of tensors, in its readable form: float32 inside (float64 for float64),
explicit masks, means over the unmasked tokens. fused_loss.py is what training uses, and tests hold it to this one.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LossWeights(NamedTuple):
    """Weighs the two parts of the loss: ce_weight * CE + kl_weight * T^2 * KL, T the temperature of the KL."""

    ce_weight: float
    kl_weight: float
    temperature: float


class LossInputs(NamedTuple):
    """Holds what the loss of some tokens is computed from, before any logits exist. The tokens have any shape (...)."""

    student_hidden: Tensor  # (..., D)
    student_head: Tensor  # (V_s, D)
    student_bias: Tensor | None  # (V_s,)
    teacher: Tensor | None  # hidden states (..., D_t), or logits (..., vocab), or None without a teacher
    teacher_head: Tensor | None  # (vocab, D_t) for hidden states, None for logits
    labels: Tensor  # (...) int64
    loss_mask: Tensor  # (...) bool
    vocab: int  # entries that both vocabularies have: softmax runs over these


def shared_vocab(student_vocab: int, teacher_vocab: int) -> int:
    """Returns how many entries both vocabularies have: the losses' softmax runs over these and no others."""
    return min(student_vocab, teacher_vocab)


def mask_unknown_labels(labels: Tensor, loss_mask: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Masks labels outside 0..vocab-1, which cannot be learned. labels, loss_mask (...). Returns the mask (...) without
    them, and how many of the unmasked tokens they were (a scalar tensor; reading it waits for the device).
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
    """Computes ce_weight * CE + kl_weight * T^2 * KL(teacher || student), T^2 as in Hinton et al. (arXiv 1503.02531).

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
