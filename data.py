"""Text to batches: open the dataset (sources.py), tokenise and pack it (packing.py), share the windows out over ranks.

Two lanes give the same windows. Cached (`--no_dataset_streaming`): tokenised once to a file, then one order of all
windows of all epochs, of which each rank takes its slice. Streaming: read, shuffled in a buffer, tokenised and packed
on the fly, each rank from its own share of the documents (streaming.py).

Each batch carries the point behind it, its `position`: a run that goes on from there sees what would have come next.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from arguments import TrainArguments
from packing import (
    Encoder,
    PackedTextDataset,
    check_tokenizer,
    run_ahead,
    wait_for_token_file,
    write_token_file,
)
from rows import check_text_field, only_texts, rows_of
from sources import cache_root, describe, explain_fault, network_forbidden, open_source, open_stream, open_table
from streaming import StreamState, TextStream

__all__ = ["Batch", "PackedTextDataset", "build_dataloader", "check_text_field", "check_tokenizer"]

logger = logging.getLogger("train")

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

    def to_json(self) -> dict[str, Any]:
        return {"windows": self.windows}


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


def build_dataloader(
    args: TrainArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rank: int,
    world_size: int,
    is_builder: bool,
    position: dict[str, Any] | None = None,
    control_group: dist.ProcessGroup | None = None,
) -> "CachedLoader | StreamingLoader":
    """This rank's batches of all epochs, from `position` on: the JSON of a batch's position, or None for the start.

    `is_builder` is true on the one process per node that tokenises and writes the cache; the others wait for
    the file. A streaming lane's ranks agree through `control_group` (CPU tensors) when to stop together.
    """
    encoder = Encoder(tokenizer)
    with network_forbidden(args.local_files_only):
        source = open_source(args)
        if source.info.features is not None:  # else known only once the data is read
            check_text_field(source.info.features, args.dataset_text_field)
        explain = functools.partial(explain_fault, source=source, args=args)
        if args.dataset_streaming:
            texts = TextStream(
                open_stream(source, args),
                args.dataset_text_field,
                shuffle_buffer=args.shuffle_buffer,
                seed=args.seed,
                rank=rank,
                world_size=world_size,
                skip_bad_rows=args.skip_bad_rows,
                explain=explain,
            )
            return StreamingLoader(texts, encoder, args, rank, control_group, position)
        made_from = describe(source, args, encoder)
        key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        directory = cache_root(args) / "packed" / key[:32]
        if directory.exists():
            logger.info("using the packed dataset %s", directory)
        elif is_builder:
            table = open_table(source, args)
            field = args.dataset_text_field
            texts_of_table = only_texts(rows_of(table, field, explain), field, args.skip_bad_rows)
            write_token_file(directory, texts_of_table, encoder, {"dataset": args.dataset_name, **made_from})
        else:
            wait_for_token_file(directory)
    windows = PackedTextDataset(directory, args.seq_length)
    start = 0 if position is None else position["windows"]
    order = WindowOrder(len(windows), args.epochs, args.batch_size, rank, world_size, args.seed, start)
    if rank == 0:
        order.log()
    return CachedLoader(windows, order, args.dataset_workers)


# ---- the cached lane


class WindowOrder:
    """One order of the windows of all epochs, a permutation for each, whatever the number of ranks. With W ranks and
    batches of B, a micro step at position p takes the windows [p, p + W * B) of it, rank r their r-th B.

    So W ranks with batch B see at every step what one rank with batch W * B sees, and ranks that go on where another
    number of ranks ended leave nothing out and take nothing twice.
    """

    def __init__(
        self, n_windows: int, epochs: int, batch_size: int, rank: int, world_size: int, seed: int, start: int = 0
    ) -> None:
        self.n_windows, self.batch_size, self.rank, self.seed = n_windows, batch_size, rank, seed
        self.step_windows = batch_size * world_size  # of all ranks in a micro step
        self.start, self.end = start, n_windows * epochs
        if n_windows < self.step_windows:
            raise ValueError(
                f"the dataset is too small: {n_windows} windows, but one micro step needs {self.step_windows} "
                f"(--batch_size {batch_size} x {world_size} ranks); {MAKE_IT_FIT}"
            )

    def __len__(self) -> int:
        """Micro steps from the start on."""
        return max(self.end - self.start, 0) // self.step_windows

    def __iter__(self) -> Iterator[list[int]]:
        """Numbers of this rank's windows, micro step by micro step."""
        window_at = functools.lru_cache(maxsize=2)(self._permutation)  # a step may end one epoch and begin another
        for step in range(len(self)):
            first = self.start + step * self.step_windows + self.rank * self.batch_size
            places = (divmod(p, self.n_windows) for p in range(first, first + self.batch_size))
            yield [int(window_at(epoch)[place]) for epoch, place in places]

    def _permutation(self, epoch: int) -> np.ndarray:
        dtype = np.uint32 if self.n_windows < 2**32 else np.int64
        return np.random.default_rng([self.seed, epoch]).permutation(self.n_windows).astype(dtype)

    def log(self) -> None:
        dropped = max(self.end - self.start, 0) % self.step_windows
        logger.info(
            "%d windows in %d epoch(s): %d micro steps from window %d of the order on; its last %d fill none",
            self.n_windows,
            self.end // self.n_windows,
            len(self),
            self.start,
            dropped,
        )


class NumberedWindows(Dataset[tuple[int, Tensor]]):
    """Windows with their numbers, so that a batch can tell what it is made of."""

    def __init__(self, windows: PackedTextDataset) -> None:
        self.windows = windows

    def __getitem__(self, i: int) -> tuple[int, Tensor]:
        return i, self.windows[i]


class CachedLoader:
    """Batches of a packed file; `len()` is the number of micro steps."""

    def __init__(self, windows: PackedTextDataset, order: WindowOrder, workers: int):
        self.order = order
        self.batches = DataLoader(
            NumberedWindows(windows),
            batch_sampler=order,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else the global random state would be drawn from
        )

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        behind = self.order.start
        # even without workers: a step must not wait for windows that are on the disk alone
        with closing(run_ahead(iter(self.batches), depth=8)) as batches:
            for batch in batches:
                behind += self.order.step_windows
                yield dataclasses.replace(batch, position=CachedPosition(behind))


def collate(items: list[tuple[int, Tensor]]) -> Batch:
    window_ids, windows = zip(*items, strict=True)
    return Batch.from_windows(torch.stack(windows), window_ids)  # (B, S + 1)


# ---- the streaming lane


class StreamingLoader:
    """Batches packed on the fly from this rank's share of a stream; how many is not known beforehand."""

    def __init__(
        self,
        texts: TextStream,
        encoder: Encoder,
        args: TrainArguments,
        rank: int,
        control_group: dist.ProcessGroup | None,
        position: dict[str, Any] | None,
    ):
        self.texts, self.encoder, self.epochs = texts, encoder, args.epochs
        self.batch_size, self.seq_len = args.batch_size, args.seq_length
        self.block = args.batch_size * (args.seq_length + 1)  # ids of a batch
        self.rank, self.control_group, self.position = rank, control_group, position

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
                f"windows of one batch (seen from rank {self.rank}); {MAKE_IT_FIT}"
            )

    def _stacks(self, epoch: int, position: dict[str, Any] | None) -> Iterator["Stack"]:
        """What a batch of texts fills, as a whole: it is made ahead, for it takes as long as many steps."""
        leftover, step, n_taken, texts_before = np.empty(0, self.encoder.dtype), 0, 0, None
        if position is not None:
            leftover = np.asarray(position["leftover"], self.encoder.dtype)
            step, n_taken, texts_before = position["first_step"], position["n_taken"], position["texts"]
        for before, texts in self.texts.batches(epoch, texts_before):
            point = StreamPosition(epoch, before, leftover, step, n_taken)
            ids = np.concatenate([leftover, self.encoder(texts)])
            blocks = ids[: len(ids) // self.block * self.block].reshape(-1, self.block)  # (batches, B * (S + 1))
            leftover = ids[blocks.size :].copy()  # else it would keep all of them alive
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
        """How many steps all ranks can take before they have to ask again; 0 where a share has ended. Shares differ
        in length, and to ask at every step would make each rank wait for the slowest.
        """
        if self.control_group is None:
            return n_ready
        least = torch.tensor(n_ready)
        dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self.control_group)
        return int(least.item())


@dataclass(frozen=True)
class Stack:
    """Batches that are ready, and the point before the first."""

    blocks: np.ndarray  # (batches, B * (S + 1))
    position: StreamPosition

    def without_first(self) -> "Stack":
        behind = dataclasses.replace(self.position, n_taken=self.position.n_taken + 1)
        return Stack(self.blocks[1:], behind)
