"""What the loaders of both lanes hand on: a `Batch` of windows, and the point behind it, its `Position`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from text.stream import StreamState

MAKE_IT_FIT = "use more text, or a smaller --seq_length or --batch_size"


@dataclass(frozen=True)
class Batch:
    """B windows. Those of rank r have `window_ids` that tell where they came from: in the cached lane their numbers in
    the token file, in a stream how many windows of this rank's share came before them in the epoch.
    """

    input_ids: Tensor  # (B, S) int64
    labels: Tensor  # (B, S) int64: the id that follows
    loss_mask: Tensor  # (B, S) bool
    window_ids: Sequence[int] = ()
    position: "Position | None" = None

    @classmethod
    def from_windows(cls, windows: Tensor, window_ids: Sequence[int] = ()) -> "Batch":  # (B, S + 1)
        inputs, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()  # (B, S) each
        return cls(inputs, labels, torch.ones_like(labels, dtype=torch.bool), window_ids)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        tensors = (change(self.input_ids), change(self.labels), change(self.loss_mask))
        return Batch(*tensors, self.window_ids, self.position)

    def pin_memory(self) -> "Batch":  # DataLoader calls this by name
        return self.with_tensors(Tensor.pin_memory)


@dataclass(frozen=True)
class CachedPosition:
    """Windows behind, of all ranks and epochs: no matter how many ranks took them."""

    windows: int
    tokens: str | None  # SHA-256 of the token file

    def to_json(self) -> dict[str, Any]:
        return {"windows": self.windows, "tokens": self.tokens}


@dataclass(frozen=True)
class StreamPosition:
    """A point in one rank's share of a stream: before the batch of texts `texts`, with the ids `leftover` of the texts
    before it, and `n_taken` batches of windows behind in what the two make.
    """

    epoch: int
    texts: StreamState
    leftover: np.ndarray  # (ids,)
    first_step: int  # batches of the epoch before these texts
    n_taken: int

    def to_json(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "texts": self.texts.to_json(),
            "leftover": self.leftover.tolist(),
            "first_step": self.first_step,
            "n_taken": self.n_taken,
        }


Position = CachedPosition | StreamPosition
