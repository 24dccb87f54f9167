"""Text to batches: `build_dataloader` opens the text (text/sources.py, text/opening.py), tokenises and packs it, and
shares the windows out over the ranks.

There are two ways to the same windows. Cached (`--no_dataset_streaming`): all text is tokenised once, to a file
(text/token_file.py), whose windows are taken in one order over all epochs; each rank takes its slice of that order.
Streaming: each rank reads its own share of the documents, shuffles it in a buffer (text/stream.py), and tokenises and
packs on the fly (text/stream_loader.py).

Each batch carries its `position`, the place behind it: a run that resumes there sees what would have come next.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
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
from text.cache import cache_fault, check_writable, packed_folder
from text.encoding import Encoder
from text.faults import Faults
from text.opening import open_source, open_stream, open_table
from text.rows import check_text_field, only_texts, rows_of
from text.sources import Opened, TextSource, network_forbidden
from text.stream import TextStream
from text.stream_loader import StreamingLoader
from text.token_check import Hash, recorded_hash, verified_hash
from text.token_file import TOKENS, read_about, token_file_inputs, wait_for_token_file, write_token_file
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
    """Returns this rank's batches of all epochs, from `position` on: the JSON of a batch's position, or None for the
    start.

    `is_builder` is true on the one process per node that tokenises and writes the cache; the others wait for the file.
    The ranks of a stream agree through `control_group` (CPU tensors) when to stop together. Raises ValueError for a
    mistake in the options of the data, or text that is too little for a micro step.
    """
    encoder, source = Encoder(tokenizer, args.document_separator), TextSource.for_training(args)
    with network_forbidden(source.local_files_only):
        opened = open_source(source)
        if opened.info.features is not None:  # else known only once the data is read
            check_text_field(opened.info.features, source)
        explain = Faults(opened, source)
        if source.streaming:
            texts = TextStream(
                open_stream(opened, source),
                source,
                shuffle_buffer=args.shuffle_buffer,
                seed=args.seed,
                rank=rank,
                world_size=world_size,
                explain=explain,
            )
            return StreamingLoader(
                texts,
                encoder,
                batch_size=args.batch_size,
                seq_len=args.seq_length,
                epochs=args.epochs,
                control_group=control_group,
                position=position,
            )
        directory, made_from = _token_folder(opened, source, encoder)
        if os.path.exists(directory):  # False where it cannot be known
            logger.info("using the packed dataset %s", directory)
        elif is_builder:
            _log_tokens_with_eos(opened, source, tokenizer)
            _pack(directory, opened, source, encoder, made_from, explain)
        else:
            wait_for_token_file(directory)
    windows = PackedTextDataset(directory, args.seq_length)
    start, trained_on = (0, None) if position is None else (position["windows"], position["tokens"])
    if None not in (trained_on, windows.about.sha256) and trained_on != windows.about.sha256:
        raise ValueError(
            f"{source.flags.name} {source.name!r}: its text gives other tokens than when the checkpoint was written; "
            "bring the data and the tokenizer back as they were, or start another run with --student_model"
        )
    found = verified_hash(directory, windows.about, trained_on) if is_builder else recorded_hash(windows.about)
    order = WindowOrder(len(windows), args.epochs, args.batch_size, rank, world_size, args.seed, start)
    if rank == 0:
        order.log()
    return CachedLoader(windows, order, args.dataset_workers, found)


def _token_folder(opened: Opened, source: TextSource, encoder: Encoder) -> tuple[Path, dict[str, object]]:
    """Returns the folder of the text's token file, and what the file is made from."""
    made_from = token_file_inputs(opened, source, encoder)
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    return packed_folder(source) / key[:32], made_from


def _pack(
    directory: Path,
    opened: Opened,
    source: TextSource,
    encoder: Encoder,
    made_from: dict[str, object],
    explain: Callable[[Exception], Exception],
) -> None:
    """Writes the text's token file."""
    check_writable(source)
    texts = only_texts(rows_of(open_table(opened, source), source.text_field, explain), source)
    try:
        write_token_file(directory, texts, encoder, {"dataset": source.name, **made_from})
    except OSError as error:  # of writing: an error of reading has been explained
        raise cache_fault(error, source) from error


def _log_tokens_with_eos(opened: Opened, source: TextSource, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warns that the text is packed anew though earlier versions of this program have packed it: with eos."""
    if (eos := tokenizer.eos_token) is None:
        return
    before, _ = _token_folder(opened, source, Encoder(tokenizer, eos))
    if os.path.exists(before):
        logger.warning(
            "%s has this text packed with %r after each document, and is not used: the text is packed anew. To use it, "
            "stop this run and give --document_separator %r",
            *(before, eos, eos),
        )


class PackedTextDataset(torch.utils.data.Dataset[Tensor]):
    """Maps a token file into memory as windows: window i is its ids [i * (S + 1), (i + 1) * (S + 1)) as int64 (S + 1,),
    with S = seq_len. Raises ValueError for a damaged file.
    """

    def __init__(self, directory: Path, seq_len: int):
        self.directory = directory
        self.seq_len = seq_len
        self.about = read_about(directory)
        dtype = self.about.dtype
        # numpy cannot map an empty file
        self._tokens = np.memmap(directory / TOKENS, dtype, mode="r") if self.about.tokens else np.empty(0, dtype)

    def __len__(self) -> int:
        return self.about.tokens // (self.seq_len + 1)

    def __getitem__(self, i: int) -> Tensor:
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        start = i * (self.seq_len + 1)
        return torch.from_numpy(self._tokens[start : start + self.seq_len + 1].astype(np.int64))  # (S + 1,)

    def __reduce__(self) -> tuple[type["PackedTextDataset"], tuple[Path, int]]:
        # For loader workers that are not forked. A pickled memory map would hold the whole file.
        return PackedTextDataset, (self.directory, self.seq_len)


class WindowOrder:
    """Orders the windows of all epochs, by a permutation for each epoch that does not depend on the number of ranks.
    With W ranks and batches of B, the micro step at position p takes the windows [p, p + W * B) of the order, and rank
    r the r-th B of them. Iterating yields the numbers of this rank's windows, micro step by micro step.

    So W ranks with batch B see at every step what one rank with batch W * B sees, and a run that resumes with another
    number of ranks leaves no window out and takes none twice. Raises ValueError if the windows do not fill a micro
    step.
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
        """Returns the number of micro steps from the start on."""
        return max(self.end - self.start, 0) // self.step_windows

    def __iter__(self) -> Iterator[list[int]]:
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
    """Pairs each window with its number, so that a batch knows what it is made of."""

    def __init__(self, windows: PackedTextDataset) -> None:
        self.windows = windows

    def __getitem__(self, i: int) -> tuple[int, Tensor]:
        return i, self.windows[i]


@dataclass(frozen=True)
class CachedPosition:
    """Marks a place in the order of the windows."""

    windows: int  # before it, of all ranks and epochs
    tokens: Hash  # of the token file

    def to_json(self) -> dict[str, Any]:
        """Waits until the token file has been read. Raises DamagedTokens: a checkpoint must not hold what was learned
        from a damaged one.
        """
        if not self.tokens.done():
            logger.info("saving waits until the cached tokens have been compared with their hash")
        return {"windows": self.windows, "tokens": self.tokens.result()}


def collate(items: list[tuple[int, Tensor]]) -> tuple[tuple[int, ...], np.ndarray]:
    """Returns the numbers of some windows (S + 1,), and the windows as an array (B, S + 1). A loader process would send
    a tensor through shared memory, of which many containers have too little.
    """
    window_ids, windows = zip(*items, strict=True)
    return window_ids, torch.stack(windows).numpy()  # (B, S + 1)


def usable_workers(wanted: int) -> int:
    """Returns how many loader processes there can be. Their queues need semaphores, which Linux keeps in /dev/shm.
    Where that is missing or full there are none, and windows are drawn in a thread only.
    """
    context = torch.multiprocessing.get_context()
    try:
        _ = [context.Semaphore() for _ in range(3 * wanted + 8 if wanted else 0)]  # as many as DataLoader makes
    except OSError as error:
        logger.warning("--dataset_workers %d: none are started, /dev/shm cannot be used (%s)", wanted, error.strerror)
        return 0
    return wanted


class CachedLoader:
    """Draws the batches of a token file; `len()` is the number of micro steps. Raises DamagedTokens once the file is
    known to be damaged.
    """

    def __init__(self, windows: PackedTextDataset, order: WindowOrder, workers: int, tokens: Hash):
        self.order, self.tokens = order, tokens
        self.batches = DataLoader(
            NumberedWindows(windows),
            batch_sampler=order,
            num_workers=usable_workers(workers),
            collate_fn=collate,
            generator=torch.Generator(),  # else it would draw from the global random state
        )

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        behind = self.order.start
        # Also without workers: a step must not wait for windows that are only on the disk.
        with closing(run_ahead(iter(self.batches), depth=8)) as batches:
            for window_ids, windows in batches:
                if self.tokens.done():
                    self.tokens.result()
                behind += self.order.step_windows
                batch = Batch.from_windows(torch.from_numpy(windows), window_ids)
                batch = dataclasses.replace(batch, position=CachedPosition(behind, self.tokens))
                yield batch.pin_memory() if torch.cuda.is_available() else batch
