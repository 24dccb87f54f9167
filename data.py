"""Text to batches: open the dataset (sources.py), tokenise and pack it (packing.py), share the windows out over ranks.

Two lanes give the same windows. Cached (`--no_dataset_streaming`): tokenised once to a file, then every epoch
one permutation of all windows, of which each rank takes its slice. Streaming: read, shuffled in a buffer,
tokenised and packed on the fly, each rank from its own share of the documents.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import datasets
import numpy as np
import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from arguments import TrainArguments
from packing import (
    Encoder,
    PackedTextDataset,
    blocks,
    check_text_field,
    check_tokenizer,
    only_texts,
    rows_of,
    run_ahead,
    text_batches,
    wait_for_token_file,
    write_token_file,
)
from sources import cache_root, describe, network_forbidden, open_source, open_stream, open_table

__all__ = ["Batch", "PackedTextDataset", "build_dataloader", "check_text_field", "check_tokenizer"]

logger = logging.getLogger("train")

NONE_READY = np.empty((0, 0), np.uint16)  # (batches, B * (S + 1))
MAKE_IT_FIT = "use more text, or a smaller --seq_length or --batch_size"


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor  # (B, S) int64
    labels: Tensor  # (B, S) int64: the id that follows
    loss_mask: Tensor  # (B, S) bool

    @classmethod
    def from_windows(cls, windows: Tensor) -> "Batch":  # (B, S + 1)
        inputs, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()  # (B, S) each
        return cls(inputs, labels, torch.ones_like(labels, dtype=torch.bool))

    def pin_memory(self) -> "Batch":  # DataLoader calls this by name
        return Batch(self.input_ids.pin_memory(), self.labels.pin_memory(), self.loss_mask.pin_memory())


def build_dataloader(
    args: TrainArguments,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rank: int,
    world_size: int,
    is_builder: bool,
    epoch: int = 0,
    start_step: int = 0,
    control_group: dist.ProcessGroup | None = None,
) -> "CachedLoader | StreamingLoader":
    """This rank's batches, from micro step `start_step` of `epoch` on.

    `is_builder` is true on the one process per node that tokenises and writes the cache; the others wait for
    the file. A streaming lane's ranks agree through `control_group` (CPU tensors) when to stop together.
    """
    encoder = Encoder(tokenizer)
    with network_forbidden(args.local_files_only):
        source = open_source(args)
        if source.info.features is not None:  # else known only once the data is read
            check_text_field(source.info.features, args.dataset_text_field)
        if args.dataset_streaming:
            stream = open_stream(source, args)
            return StreamingLoader(stream, encoder, args, rank, world_size, control_group, epoch, start_step)
        made_from = describe(source, args, encoder)
        key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
        directory = cache_root(args) / "packed" / key[:32]
        if directory.exists():
            logger.info("using the packed dataset %s", directory)
        elif is_builder:
            table = open_table(source, args)
            texts = only_texts(rows_of(table, args.dataset_text_field), args.dataset_text_field)
            write_token_file(directory, texts, encoder, {"dataset": args.dataset_name, **made_from})
        else:
            wait_for_token_file(directory)
    windows = PackedTextDataset(directory, args.seq_length)
    sampler = RankBatchSampler(len(windows), args.batch_size, rank, world_size, args.seed)
    if rank == 0:
        sampler.log()
    sampler.set_epoch(epoch, start_step)
    return CachedLoader(windows, sampler, args.dataset_workers)


# ---- the cached lane


class RankBatchSampler(Sampler[list[int]]):
    """Micro step t takes positions [t * W * B, (t + 1) * W * B) of the epoch's order, rank r their r-th B.

    So W ranks with batch B see at every step what one rank with batch W * B sees.
    """

    def __init__(self, n_windows: int, batch_size: int, rank: int, world_size: int, seed: int):
        needed = batch_size * world_size
        if n_windows < needed:
            raise ValueError(
                f"the dataset is too small: {n_windows} windows, but one micro step needs {needed} "
                f"(--batch_size {batch_size} x {world_size} ranks); {MAKE_IT_FIT}"
            )
        self.n_windows, self.batch_size, self.seed = n_windows, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.n_steps = n_windows // needed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.n_windows)
        used = order[: self.n_steps * self.world_size * self.batch_size]
        by_rank = used.reshape(self.n_steps, self.world_size, self.batch_size)  # (steps, W, B)
        mine = by_rank[self.start_step :, self.rank].copy()  # (steps left, B)
        del order, used, by_rank  # W times as large, and not needed for the rest of the epoch
        for batch in mine:
            yield batch.tolist()

    def log(self) -> None:
        dropped = self.n_windows - self.n_steps * self.world_size * self.batch_size
        logger.info(
            "%d windows: %d micro steps an epoch, the last %d windows of an epoch's order fill no batch",
            self.n_windows,
            self.n_steps,
            dropped,
        )


class CachedLoader:
    """Batches of a packed file; `len()` is the number of micro steps in an epoch."""

    def __init__(self, windows: PackedTextDataset, sampler: RankBatchSampler, workers: int):
        self.order = sampler
        self.batches = DataLoader(
            windows,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every epoch would draw from the global random state
        )

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.order.set_epoch(epoch, start_step)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        # even without workers: a step must not wait for windows that are on the disk alone
        with closing(run_ahead(iter(self.batches), depth=8)) as batches:
            yield from batches


def collate(windows: list[Tensor]) -> Batch:
    return Batch.from_windows(torch.stack(windows))  # (B, S + 1)


# ---- the streaming lane


class StreamingLoader:
    """Batches packed on the fly from this rank's share of a stream; how many is not known beforehand."""

    def __init__(
        self,
        stream: datasets.IterableDataset,
        encoder: Encoder,
        args: TrainArguments,
        rank: int,
        world_size: int,
        control_group: dist.ProcessGroup | None,
        epoch: int,
        start_step: int,
    ):
        self.stream, self.encoder, self.field = stream, encoder, args.dataset_text_field
        self.batch_size, self.seq_len = args.batch_size, args.seq_length
        self.rank, self.world_size, self.control_group = rank, world_size, control_group
        self.seed, self.shuffle_buffer = args.seed, args.shuffle_buffer
        self.n_tokens = 0  # read in this epoch
        self.set_epoch(epoch, start_step)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """A stream cannot be entered in the middle: steps before `start_step` are tokenised and dropped."""
        self.epoch, self.start_step = epoch, start_step

    def __iter__(self) -> Iterator[Batch]:
        step = 0
        with closing(run_ahead(self._encoded(), depth=1)) as encoded:
            stacks = blocks(encoded, self.batch_size * (self.seq_len + 1))
            ready = next(stacks, NONE_READY)  # (batches, B * (S + 1))
            while agreed := self._least_of_all_ranks(len(ready)):
                for block in ready[:agreed]:
                    step += 1
                    if step > self.start_step:
                        yield self._batch(block)
                ready = ready[agreed:] if agreed < len(ready) else next(stacks, NONE_READY)
        if step == 0:
            windows = self.n_tokens // (self.seq_len + 1)
            raise ValueError(
                f"the dataset is too small: some rank's share of it has fewer than the {self.batch_size} "
                f"windows of one batch (rank {self.rank} read {windows}); {MAKE_IT_FIT}"
            )

    def _share(self) -> datasets.IterableDataset:
        """This rank's rows in this epoch's order. `set_epoch` of `datasets` would shuffle files unasked."""
        stream = self.stream
        if self.shuffle_buffer > 0:
            order = np.random.default_rng([self.seed, self.epoch])  # the same on every rank
            stream = stream.shuffle(generator=order, buffer_size=self.shuffle_buffer)
        return split_dataset_by_node(stream, self.rank, self.world_size)

    def _encoded(self) -> Iterator[np.ndarray]:
        """Ids of many documents at a time: as a whole they are made ahead, for each takes as long as many steps."""
        self.n_tokens = 0
        for texts in text_batches(only_texts(rows_of(self._share(), self.field), self.field)):
            ids = self.encoder(texts)  # (tokens,)
            self.n_tokens += len(ids)
            yield ids

    def _batch(self, block: np.ndarray) -> Batch:
        windows = torch.from_numpy(block.astype(np.int64)).view(self.batch_size, -1)  # (B, S + 1)
        batch = Batch.from_windows(windows)
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
