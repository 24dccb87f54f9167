"""Looks at the teacher's answer to the first batch, before anything is learned from it or saved."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distillation.teacher import Lane
from processes.ranks import Ranks
from text.batch import Batch

CHUNK_TOKENS = 256  # whose logits exist at a time


def check_first_answer(name: str, lane: Lane, head: Tensor | None, batch: Batch | None, ranks: Ranks) -> None:
    """Raises ValueError on all ranks if the answer to the first batch of any of them has logits that are not finite:
    every update would be skipped. Costs one forward pass of the teacher; without a teacher it does nothing.

    name: of the teacher. head (vocab, D_t): for answers that are hidden states. batch: None if there is none.
    """
    signal = None if batch is None else lane.submit(batch.input_ids).result()  # (B, S, D_t) or (B, S, vocab)
    lane.waits.take()  # no step has waited for it
    (n_bad,) = ranks.maximum(0 if signal is None else count_not_finite(signal, head))
    if n_bad:
        raise ValueError(
            f"--teacher_model {name}: its logits for the first batch are not finite ({n_bad} tokens of a rank), though "
            "all its weights are; copy its config.json again, take another teacher, or try --dtype float32"
        )


@torch.no_grad()
def count_not_finite(signal: Tensor, head: Tensor | None) -> int:
    """Returns how many tokens of an answer (B, S, width) have logits that are not finite. head: as above."""
    n_bad = torch.zeros((), dtype=torch.int64, device=signal.device)
    for chunk in signal.flatten(0, 1).split(CHUNK_TOKENS):  # (n, width)
        logits = chunk if head is None else F.linear(chunk, head)  # (n, vocab)
        n_bad += logits.isfinite().all(-1).logical_not().sum()
    return int(n_bad)
