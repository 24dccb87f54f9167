"""Text to batches: find the dataset, tokenise and pack it (packing.py), share the windows out over the ranks.

Two lanes give the same windows. Cached (`--no_dataset_streaming`): tokenised once to a file, then every epoch
one permutation of all windows, of which each rank takes its slice. Streaming: read, shuffled in a buffer,
tokenised and packed on the fly, each rank from its own share of the documents.
"""

import glob
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

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
    FORMAT_VERSION,
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

__all__ = ["Batch", "PackedTextDataset", "build_dataloader", "check_text_field", "check_tokenizer"]

logger = logging.getLogger("train")

SAVED_TO_DISK = ("state.json", "dataset_dict.json")
MAKE_IT_FIT = "use more text, or a smaller --seq_length or --batch_size"
FILE_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


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


# ---- where the text comes from


@contextmanager
def network_forbidden(forbidden: bool) -> Iterator[None]:
    """`datasets` reads HF_HUB_OFFLINE when it is imported; this has the same effect afterwards."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or forbidden
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def cache_root(args: TrainArguments) -> Path:
    return Path(args.dataset_cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser()


def open_source(args: TrainArguments) -> datasets.Dataset | datasets.DatasetBuilder:
    """The named data, not read yet: a `save_to_disk` folder, or a builder for files or a hub dataset."""
    name = args.dataset_name
    path = local_path(name)
    reader, files = name, None
    if path is not None:
        if args.dataset_revision is not None:
            raise ValueError(f"--dataset_revision {args.dataset_revision!r}: {name} is local; leave it out")
        reader, is_saved = str(path), any((path / mark).exists() for mark in SAVED_TO_DISK)
        if args.dataset_subset is not None and (is_saved or path.is_file()):
            raise ValueError(f"--dataset_subset {args.dataset_subset!r}: {name} has none; leave it out")
        if is_saved:
            return open_saved(path, args.dataset_split)
        if path.is_file():
            reader, files = file_reader(path), glob.escape(str(path))
    try:
        builder = datasets.load_dataset_builder(
            reader,
            args.dataset_subset,
            data_files=files,
            revision=args.dataset_revision,
            download_config=datasets.DownloadConfig(local_files_only=args.local_files_only),
        )
    except (OSError, ValueError, RuntimeError) as error:
        what = f"--dataset_name {name!r} (subset {args.dataset_subset!r}, revision {args.dataset_revision!r})"
        if path is None and args.local_files_only:
            raise ValueError(
                f"{what} is not in the cache {datasets.config.HF_DATASETS_CACHE} and --local_files_only "
                f"forbids fetching it: run once without that flag, or give a file or directory ({error})"
            ) from error
        raise ValueError(f"{what} cannot be opened: {error}") from error
    available = [str(split) for split in builder.info.splits or builder.config.data_files or ()]
    check_split(args.dataset_split, available)
    if path is not None and path.is_dir() and args.dataset_subset is None:
        warn_of_ignored_files(path, builder)
    if args.local_files_only and args.dataset_revision not in (None, builder.hash):
        logger.warning("--dataset_revision %s not checked: %s is cached", args.dataset_revision, builder.hash)
    return builder


def local_path(name: str) -> Path | None:
    """The path that `name` means, or None for the name of a hub dataset."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    has_ending = path.suffix in (".gz", *FILE_READERS)
    if "://" not in name and (has_ending or name.startswith((".", "~", "/")) or name.count("/") > 1):
        raise ValueError(f"--dataset_name {name!r}: no such file or directory; give a path or a hub dataset")
    return None


def file_ending(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def file_reader(path: Path) -> str:
    reader = FILE_READERS.get(file_ending(path))
    if reader is None or (reader == "parquet" and path.suffix == ".gz"):
        raise ValueError(
            f"--dataset_name {str(path)!r}: unsupported file ending, expected one of "
            f"{', '.join(FILE_READERS)} (all but .parquet also with .gz); convert the file"
        )
    return reader


def warn_of_ignored_files(directory: Path, builder: datasets.DatasetBuilder) -> None:
    """`datasets` reads the files of the commonest kind in a directory and passes over the others in silence."""
    read = {file for split in (builder.config.data_files or {}).values() for file in split}
    found = sorted(str(path.resolve()) for path in directory.rglob("*") if file_ending(path) in FILE_READERS)
    if ignored := [file for file in found if file not in read]:
        logger.warning("%d file(s) of %s are not read, for example %s", len(ignored), directory, ignored[0])


def open_saved(path: Path, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(path))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or split): saved}
    if split not in splits:
        raise split_error(split, list(splits))
    return splits[split]


def check_split(split: str, available: list[str]) -> None:
    """`split` may be an expression ("train[:1%]+test"); `available` is empty where it is not known yet."""
    names = {part.split("[")[0].strip() for part in split.split("+")}
    if available and not names <= {*available, "all"}:
        raise split_error(split, available)


def split_error(split: str, available: list[str]) -> ValueError:
    return ValueError(f"--dataset_split {split!r}: no such split; available: {', '.join(available)}")


def open_table(source: datasets.Dataset | datasets.DatasetBuilder, args: TrainArguments) -> datasets.Dataset:
    """The whole dataset as a memory-mapped table."""
    if isinstance(source, datasets.DatasetBuilder):
        try:
            source.download_and_prepare(download_config=datasets.DownloadConfig(local_files_only=args.local_files_only))
        except datasets.exceptions.DatasetsError as error:
            raise ValueError(
                f"--dataset_name {args.dataset_name!r} cannot be read: {error.__cause__ or error}"
            ) from error
        try:
            source = source.as_dataset(split=args.dataset_split)
        except ValueError as error:
            raise ValueError(f"--dataset_split {args.dataset_split!r}: {error}") from error
    check_text_field(source.features, args.dataset_text_field)
    return source.select_columns([args.dataset_text_field])


def open_stream(source: datasets.Dataset | datasets.DatasetBuilder, args: TrainArguments) -> datasets.IterableDataset:
    if isinstance(source, datasets.Dataset):
        stream = source.to_iterable_dataset()
    else:
        try:
            stream = source.as_streaming_dataset(split=args.dataset_split)
        except ValueError as error:
            raise ValueError(f"--dataset_split {args.dataset_split!r}: {error}") from error
    first = list(stream.take(1))  # also finds data that cannot be read, before a model is loaded
    if not first:
        raise ValueError(f"--dataset_name {args.dataset_name!r}: split {args.dataset_split!r} has no rows")
    check_text_field(stream.features or datasets.Dataset.from_list(first).features, args.dataset_text_field)
    return stream.select_columns([args.dataset_text_field])


def describe(
    source: datasets.Dataset | datasets.DatasetBuilder, args: TrainArguments, encoder: Encoder
) -> dict[str, object]:
    """All that decides what the token file holds. Local files by size and time too: an edit is seen."""
    if isinstance(source, datasets.Dataset):
        fingerprint = source._fingerprint
        files = [file["filename"] for file in source.cache_files]
    else:
        fingerprint = "/".join(Path(source.cache_dir).parts[-4:])  # name / configuration / version / hash
        files = [file for split in (source.config.data_files or {}).values() for file in split]
    stats = [(file, os.stat(file)) for file in sorted(files) if os.path.exists(file)]
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "files": [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats],
        "split": args.dataset_split,
        "text_field": args.dataset_text_field,
        "tokenizer": encoder.digest,
        "eos_id": encoder.eos_id,
    }


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


class CachedLoader(DataLoader):
    """Batches of a packed file; `len()` is the number of micro steps in an epoch."""

    def __init__(self, windows: PackedTextDataset, sampler: RankBatchSampler, workers: int):
        self.order = sampler
        super().__init__(
            windows,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every epoch would draw from the global random state
        )

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.order.set_epoch(epoch, start_step)


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
        step = self.start_step
        with closing(run_ahead(self._batches(), depth=4)) as batches:
            mine = islice(batches, self.start_step, None)
            while True:
                batch = next(mine, None)
                agreed = self._all_ranks(batch is not None)
                if batch is None or not agreed:
                    break
                yield batch
                step += 1
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

    def _batches(self) -> Iterator[Batch]:
        texts = only_texts(rows_of(self._share(), self.field), self.field)
        for block in blocks(self._encoded(texts), self.batch_size * (self.seq_len + 1)):
            windows = torch.from_numpy(block.astype(np.int64)).view(self.batch_size, -1)  # (B, S + 1)
            batch = Batch.from_windows(windows)
            yield batch.pin_memory() if torch.cuda.is_available() else batch

    def _encoded(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        self.n_tokens = 0
        for batch in text_batches(texts):
            ids = self.encoder(batch)  # (tokens,)
            self.n_tokens += len(ids)
            yield ids

    def _all_ranks(self, here: bool) -> bool:
        """Shares differ in length: a step is taken only if every rank has a batch for it."""
        if self.control_group is None:
            return here
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.control_group)
        return bool(flag.item())
