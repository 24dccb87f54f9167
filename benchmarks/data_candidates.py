"""The candidates of bench_data.py, and the text and tokenizer that they get. PACK: from documents to stored windows.
LOAD: from stored windows, or from documents, to batches.
"""

import json
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, Row

BARE, ONCE, TWO_PROCESSES = "encode_batch_fast", "encode_batch_fast, once", "datasets.map, 2 processes"
SEQ_LEN = 1024  # of the windows that packing stores
GROUP = 1000  # documents, the default of datasets.map
VOCAB = 32000  # of the tokenizer that is trained here

# --- text and tokenizer, made once ---------------------------------------------------------------------------


def read_text() -> str:
    """Returns all real English text that is here."""
    files = [ROOT / "presets/tiny/text/english.txt", *sorted(ROOT.parent.glob("shared/data/text/*.txt"))]
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files)


def prepare(folder: str) -> Row:
    """Saves a tokenizer of real size: the default teacher's if it is on this disk, else one trained here."""
    from transformers import AutoTokenizer

    teacher = json.loads((ROOT / "presets/llamba-8b/preset.json").read_text())["common"]["teacher_model"]
    try:
        tokenizer, name = AutoTokenizer.from_pretrained(teacher, local_files_only=True), teacher
    except OSError:
        tokenizer, name = train_tokenizer(), "byte-level BPE trained here"
    tokenizer.save_pretrained(folder)
    return {"name": f"{name}, {len(tokenizer)} tokens"}


def train_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([read_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end)


def make_documents(megabytes: float, characters: float) -> list[str]:
    """Joins paragraphs into documents of at least `characters`, until there are `megabytes` of them."""
    paragraphs = read_text().split("\n\n")
    documents: list[str] = []
    parts: list[str] = []
    total = length = 0
    while total < megabytes * 1e6:
        for paragraph in paragraphs:
            parts.append(paragraph)
            length += len(paragraph) + 2
            if length >= characters:
                documents.append("\n\n".join(parts))
                total += length
                parts, length = [], 0
    return documents


def write_jsonl(documents: list[str], file: Path) -> Path:
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return file


def load_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def open_loader(jsonl: Path, cache: Path, tokenizer: Any, options: str) -> Any:
    """Builds the loader of a training run with one rank."""
    import datasets

    from arguments import parse_train_args
    from data import build_dataloader

    datasets.config.HF_DATASETS_CACHE = cache
    args = parse_train_args(["--dataset_name", str(jsonl), "--local_files_only", *options.split()])
    return build_dataloader(args, tokenizer, rank=0, world_size=1, is_builder=True)


# --- packing -------------------------------------------------------------------------------------------------


@dataclass
class PackInputs:
    """Holds what every packing candidate of a case gets. `folder` is empty before each run."""

    documents: list[str]
    table: Any  # datasets.Dataset of the documents
    jsonl: Path
    tokenizer: Any
    encoder: Any  # text.encoding.Encoder
    folder: Path


Windows = Any  # what was stored: a sequence of windows (S + 1,), read when indexed


def bare(inputs: PackInputs) -> Windows:
    from text.encoding import text_batches

    for texts in text_batches(inputs.documents):
        inputs.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return ()


def bare_once(inputs: PackInputs) -> Windows:
    inputs.tokenizer.backend_tokenizer.encode_batch_fast(inputs.documents, add_special_tokens=False)
    return ()


def ours(inputs: PackInputs) -> Windows:
    from data import PackedTextDataset
    from text.token_file import write_token_file

    write_token_file(inputs.folder / "ours", inputs.documents, inputs.encoder, {})
    return PackedTextDataset(inputs.folder / "ours", SEQ_LEN)


def ours_from_jsonl(inputs: PackInputs) -> Windows:
    options = f"--no_dataset_streaming --seq_length {SEQ_LEN} --dataset_cache_dir {inputs.folder}"
    loader = open_loader(inputs.jsonl, inputs.folder, inputs.tokenizer, options)
    next(iter(loader))
    return loader.batches.dataset.windows


def per_document(inputs: PackInputs) -> Windows:
    ids = []
    for document in inputs.documents:
        ids += inputs.tokenizer(document, add_special_tokens=False)["input_ids"]
        ids.append(inputs.tokenizer.eos_token_id)
    full = len(ids) // (SEQ_LEN + 1) * (SEQ_LEN + 1)
    np.save(inputs.folder / "windows.npy", np.array(ids[:full], inputs.encoder.dtype).reshape(-1, SEQ_LEN + 1))
    return np.load(inputs.folder / "windows.npy", mmap_mode="r")


def datasets_map(inputs: PackInputs, processes: int) -> Windows:
    tokenizer, size = inputs.tokenizer, SEQ_LEN + 1

    def to_ids(rows: dict) -> dict:
        encoded = tokenizer(rows["text"], add_special_tokens=False, return_attention_mask=False)
        return {"ids": [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]}

    def to_windows(rows: dict) -> dict:
        ids = list(chain.from_iterable(rows["ids"]))
        return {"ids": [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]}

    table = inputs.table
    for step, function in enumerate((to_ids, to_windows)):
        table = table.map(
            function,
            batched=True,
            batch_size=GROUP,
            remove_columns=table.column_names,
            num_proc=processes if processes > 1 else None,
            cache_file_name=str(inputs.folder / f"step-{step}.arrow"),
            load_from_cache_file=False,
        )
    return table.with_format("numpy")["ids"]


PACK: dict[str, Callable[[PackInputs], Windows]] = {
    BARE: bare,
    ONCE: bare_once,
    "ours": ours,
    "ours, from jsonl": ours_from_jsonl,
    "per-document loop": per_document,
    "datasets.map, 1 process": partial(datasets_map, processes=1),
    TWO_PROCESSES: partial(datasets_map, processes=2),
}


# --- loading -------------------------------------------------------------------------------------------------

Batches = Generator[Any, None, None]  # one rank's, of one epoch


@dataclass
class LoadInputs:
    """Holds what every loading candidate of a case gets."""

    documents: list[str]
    jsonl: Path
    tokenizer: Any
    cache: Path
    batch_size: int
    seq_len: int

    def open(self, options: str) -> Any:
        options += f" --batch_size {self.batch_size} --seq_length {self.seq_len} --dataset_cache_dir {self.cache}"
        return open_loader(self.jsonl, self.cache, self.tokenizer, options)

    def open_cached(self, workers: int) -> Any:
        """Opens the cached file after evicting it from memory, as far as no other process has it open."""
        for file in self.cache.glob("packed/*/tokens.bin"):
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return self.open(f"--no_dataset_streaming --dataset_workers {workers}")


def cached(inputs: LoadInputs, workers: int) -> Batches:
    return iter(inputs.open_cached(workers))


def data_loader(inputs: LoadInputs) -> Batches:
    yield from inputs.open_cached(workers=0).batches


def stream(inputs: LoadInputs) -> Batches:
    return iter(inputs.open("--shuffle_buffer 0"))


def stream_not_ahead(inputs: LoadInputs) -> Batches:
    import torch

    from text.batch import Batch
    from text.encoding import Encoder, blocks, text_batches

    encoder = Encoder(inputs.tokenizer)
    arrays = (encoder(texts) for texts in text_batches(inputs.documents))
    for stack in blocks(arrays, inputs.batch_size * (inputs.seq_len + 1)):
        for block in stack:
            yield Batch.from_windows(torch.from_numpy(block.astype(np.int64)).view(inputs.batch_size, -1))


LOAD: dict[str, Callable[[LoadInputs], Batches]] = {
    "cached, 0 workers": partial(cached, workers=0),
    "cached, 2 workers": partial(cached, workers=2),
    "DataLoader": data_loader,
    "stream": stream,
    "stream, not ahead": stream_not_ahead,
}
