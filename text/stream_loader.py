"""The loader of a stream: batches packed on the fly, a stack of them ahead of the steps, and ranks that agree when to
stop together. `data.CachedLoader` is the other one.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from text.batch import MAKE_IT_FIT, Batch
from text.encoding import Encoder
from text.stream import StreamState, TextStream
from utils import run_ahead


@dataclass(frozen=True)
class StreamPosition:
    """Marks a place in one rank's share of a stream: `n_taken` batches into those that fill from `leftover` and the
    next texts.
    """

    epoch: int
    texts: StreamState  # the place before these texts
    leftover: np.ndarray  # (ids,) of the texts before them that filled no batch
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


@dataclass(frozen=True)
class Stack:
    """Holds batches that are ready, and the place before the first."""

    blocks: np.ndarray  # (batches, B * (S + 1))
    position: StreamPosition

    def without_first(self) -> "Stack":
        behind = dataclasses.replace(self.position, n_taken=self.position.n_taken + 1)
        return Stack(self.blocks[1:], behind)


class StreamingLoader:
    """Packs this rank's share of a stream into batches, from `position` on: the JSON of a `StreamPosition`, or None for
    the start. How many batches there are is not known beforehand. Raises ValueError if there is none in an epoch.
    """

    def __init__(
        self,
        texts: TextStream,
        encoder: Encoder,
        *,
        batch_size: int,
        seq_len: int,
        epochs: int,
        control_group: dist.ProcessGroup | None = None,
        position: dict[str, Any] | None = None,
    ):
        self.texts, self.encoder, self.batch_size, self.epochs = texts, encoder, batch_size, epochs
        self.block = batch_size * (seq_len + 1)  # ids of a batch
        self.control_group, self.position = control_group, position

    def __iter__(self) -> Iterator[Batch]:
        first = 0 if self.position is None else self.position["epoch"]
        for epoch in range(first, self.epochs):
            yield from self._one_epoch(epoch, self.position if epoch == first else None)

    def _one_epoch(self, epoch: int, position: dict[str, Any] | None) -> Iterator[Batch]:
        began = position is not None
        with closing(run_ahead(self._stacks(epoch, position), depth=1)) as stacks:
            ready = next(stacks, None)
            while agreed := self._least_of_all_ranks(len(ready.blocks) if ready else 0):
                assert ready is not None
                for _ in range(agreed):
                    block, ready = ready.blocks[0], ready.without_first()
                    began = True
                    yield self._batch(block, ready.position)
                if not len(ready.blocks):
                    ready = next(stacks, None)
        if not began:
            raise ValueError(
                f"the dataset is too small: some rank's share of it has fewer than the {self.batch_size} "
                f"windows of one batch (seen from rank {self.texts.rank}); {MAKE_IT_FIT}"
            )

    def _stacks(self, epoch: int, position: dict[str, Any] | None) -> Iterator[Stack]:
        """Yields what each batch of texts fills. It is made ahead, because it takes as long as many steps."""
        leftover, step, n_taken, texts_before = np.empty(0, self.encoder.dtype), 0, 0, None
        if position is not None:
            leftover = np.asarray(position["leftover"], self.encoder.dtype)
            step, n_taken, texts_before = position["first_step"], position["n_taken"], position["texts"]
        for before, texts in self.texts.batches(epoch, texts_before):
            point = StreamPosition(epoch, before, leftover, step, n_taken)
            ids = np.concatenate([leftover, self.encoder(texts)])
            blocks = ids[: len(ids) // self.block * self.block].reshape(-1, self.block)  # (batches, B * (S + 1))
            leftover = ids[blocks.size :].copy()  # a view would keep all ids alive
            step += len(blocks)
            if len(blocks) > n_taken:
                yield Stack(blocks[n_taken:], point)
            n_taken = 0

    def _batch(self, block: np.ndarray, behind: StreamPosition) -> Batch:
        windows = torch.from_numpy(block.astype(np.int64)).view(self.batch_size, -1)  # (B, S + 1)
        first = (behind.first_step + behind.n_taken - 1) * self.batch_size
        batch = Batch.from_windows(windows, range(first, first + self.batch_size))
        batch = dataclasses.replace(batch, position=behind)
        return batch.pin_memory() if torch.cuda.is_available() else batch

    def _least_of_all_ranks(self, n_ready: int) -> int:
        """Returns how many steps all ranks can take before they agree again, or 0 once a share has ended. If they
        agreed at every step, each would wait for the slowest.
        """
        if self.control_group is None:
            return n_ready
        least = torch.tensor(n_ready)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.control_group)
        return int(least.item())
