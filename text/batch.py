"""What both loaders, cached and streaming, yield: a `Batch` of windows, and its `Position`, the place behind it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

MAKE_IT_FIT = "use more text, or a smaller --seq_length or --batch_size"


class Position(Protocol):
    """Marks a place in a rank's data, behind a batch, that a resumed run can begin at."""

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Batch:
    """Holds B windows. `window_ids` say where they come from: cached, they are numbers of windows in the token file; in
    a stream, a window's id is how many of this rank's share came before it in the epoch.
    """

    input_ids: Tensor  # (B, S) int64
    labels: Tensor  # (B, S) int64: the id that follows
    loss_mask: Tensor  # (B, S) bool
    window_ids: Sequence[int] = ()
    position: Position | None = None

    @classmethod
    def from_windows(cls, windows: Tensor, window_ids: Sequence[int] = ()) -> "Batch":
        """Splits windows (B, S + 1) into inputs and labels, with nothing masked."""
        inputs, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()  # (B, S) each
        return cls(inputs, labels, torch.ones_like(labels, dtype=torch.bool), window_ids)

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Returns this batch with each tensor changed, to move it to a device, say."""
        tensors = (change(self.input_ids), change(self.labels), change(self.loss_mask))
        return Batch(*tensors, self.window_ids, self.position)

    def pin_memory(self) -> "Batch":
        return self.with_tensors(Tensor.pin_memory)
