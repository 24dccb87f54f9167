"""Text to batches: open the dataset (sources.py), tokenise and pack it (packing.py), share the windows out over ranks.

Two lanes give the same windows. Cached (`--no_dataset_streaming`): tokenised once to a file, then one order of all
windows of all epochs, of which each rank takes its slice. Streaming: read, shuffled in a buffer, tokenised and packed
on the fly, each rank from its own share of the documents (streaming.py, stream_loader.py).

Each batch carries the point behind it, its `position`: a run that goes on from there sees what would have come next.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from arguments import TrainArguments
from text.batch import MAKE_IT_FIT, Batch
from text.encoding import Encoder
from text.rows import check_text_field, only_texts, rows_of
from text.sources import cache_root, describe, explain_fault, network_forbidden, open_source, open_stream, open_table
from text.stream import TextStream
from text.stream_loader import StreamingLoader
from text.token_file import wait_for_token_file, write_token_file
from utils import run_ahead

logger = logging.getLogger("train")


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
    if position is not None and None not in (found := {position["tokens"], windows.sha256}) and len(found) > 1:
        raise ValueError(
            f"--dataset_name {args.dataset_name!r}: its text gives other tokens than when the checkpoint was written; "
            "bring the data and the tokenizer back as they were, or start another run with --student_model"
        )
    order = WindowOrder(len(windows), args.epochs, args.batch_size, rank, world_size, args.seed, start)
    if rank == 0:
        order.log()
    return CachedLoader(windows, order, args.dataset_workers)


# ---- the cached lane


class PackedTextDataset(torch.utils.data.Dataset[Tensor]):
    """Window i of a token file: ids [i * (seq_len + 1), (i + 1) * (seq_len + 1)), memory-mapped."""

    def __init__(self, directory: Path, seq_len: int):
        self.directory = directory
        self.seq_len = seq_len
        about = json.loads((directory / "about.json").read_text(encoding="utf-8"))
        self.n_tokens: int = about["tokens"]
        self.sha256: str | None = about.get("sha256")  # of all tokens; token files of before do not tell
        dtype = np.dtype(about["dtype"])
        path = directory / "tokens.bin"
        if path.stat().st_size != self.n_tokens * dtype.itemsize:
            raise ValueError(f"{path} does not hold {self.n_tokens} {dtype} tokens: delete {directory}")
        # numpy cannot map an empty file
        self._tokens = np.memmap(path, dtype, mode="r") if self.n_tokens else np.empty(0, dtype)

    def __len__(self) -> int:
        return self.n_tokens // (self.seq_len + 1)

    def __getitem__(self, i: int) -> Tensor:
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        start = i * (self.seq_len + 1)
        return torch.from_numpy(self._tokens[start : start + self.seq_len + 1].astype(np.int64))  # (S + 1,)

    def __reduce__(self) -> tuple[type["PackedTextDataset"], tuple[Path, int]]:
        # for loader workers that are not forked: a pickled memory map would carry the whole file
        return PackedTextDataset, (self.directory, self.seq_len)


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


@dataclass(frozen=True)
class CachedPosition:
    """Windows behind, of all ranks and epochs: no matter how many ranks took them."""

    windows: int
    tokens: str | None  # SHA-256 of the token file

    def to_json(self) -> dict[str, Any]:
        return {"windows": self.windows, "tokens": self.tokens}


class CachedLoader:
    """Batches of a packed file; `len()` is the number of micro steps."""

    def __init__(self, windows: PackedTextDataset, order: WindowOrder, workers: int):
        self.order, self.tokens = order, windows.sha256
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
                yield dataclasses.replace(batch, position=CachedPosition(behind, self.tokens))


def collate(items: list[tuple[int, Tensor]]) -> Batch:
    window_ids, windows = zip(*items, strict=True)
    return Batch.from_windows(torch.stack(windows), window_ids)  # (B, S + 1)
