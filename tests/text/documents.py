"""Helpers for tests of text: random documents, a small tokenizer, data of every kind, and what loaders make of it."""

import dataclasses
import functools
import gzip
import json
import random
import shutil
import threading
from pathlib import Path

import datasets
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from arguments import TrainArguments
from data import build_dataloader
from text import encoding

EOS = "<|endoftext|>"
WORDS = ["the", "cat", " sat", "\n", "naïve", "日本", "  ", "42", EOS, "🙂", "x" * 40, "\t", "don't", "."]
SEQ = 8


@functools.cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["the cat sat on the mat, the cat that sat"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS)


def random_documents(seed: int, n: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(WORDS, k=rng.choice([1, 2, 7, 33, 150]))) for _ in range(n)]


def plain_ids(documents: list[str]) -> list[int]:
    """Returns the ids by definition: each document by the byte-level model alone, blind to special tokens, then EOS."""
    tokenizer = small_tokenizer()
    plain = tokenizers.Tokenizer(tokenizer.backend_tokenizer.model)
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ids = []
    for document in documents:
        ids += [*plain.encode(document).ids, tokenizer.eos_token_id]
    return ids


def expected_windows(documents: list[str], seq: int = SEQ) -> list[list[int]]:
    ids = plain_ids(documents)
    return [ids[i : i + seq + 1] for i in range(0, len(ids) - seq, seq + 1)]


def write_jsonl(path: Path, rows: list, field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: row}) + "\n" for row in rows), encoding="utf-8")
    return path


def options(name: Path | str, **changes) -> TrainArguments:
    """Returns options of data: cached, in order, everything else as by default."""
    args = TrainArguments(
        dataset_name=str(name),
        dataset_streaming=False,
        shuffle_buffer=0,
        seq_length=SEQ,
        batch_size=2,
        seed=0,
        # required, and nothing to do with data
        teacher_model="",
        student_model="",
        layers=[0],
        dtype="float32",
        output_dir="",
    )
    return dataclasses.replace(args, **changes)


def loader(args: TrainArguments, rank: int = 0, world_size: int = 1, tokenizer=None, **more):
    tokenizer = tokenizer or small_tokenizer()
    return build_dataloader(args, tokenizer, rank=rank, world_size=world_size, is_builder=rank == 0, **more)


def windows_of(batches) -> list[list[int]]:
    """Returns the windows that batches were made of, in order."""
    rows = [torch.cat([batch.input_ids, batch.labels[:, -1:]], dim=1) for batch in batches]
    return [window for row in rows for window in row.tolist()]


def ids_of(batches) -> list[int]:
    return [i for batch in batches for i in batch.window_ids]


def place_behind(batch) -> dict:
    """Returns the position of a batch as a checkpoint holds it."""
    return json.loads(json.dumps(batch.position.to_json()))


def packed_dirs(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "hf" / "packed").glob("*"))


def record_encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a list that grows by the texts that are tokenised from now on."""
    encoded: list[str] = []
    encode = encoding.Encoder.__call__
    monkeypatch.setattr(encoding.Encoder, "__call__", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    return encoded


def ahead_threads() -> int:
    return sum(thread.name == "run-ahead" for thread in threading.enumerate())


def as_jsonl(path: Path, documents: list[str]) -> Path:
    return write_jsonl(path / "a [1]*.jsonl", documents)  # a name that is also a pattern


def as_json(path: Path, documents: list[str]) -> Path:
    (path / "a.json").write_text(json.dumps([{"text": document} for document in documents]))
    return path / "a.json"


def as_gzip(path: Path, documents: list[str]) -> Path:
    with gzip.open(path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    return path / "a.jsonl.gz"


def as_parquet(path: Path, documents: list[str]) -> Path:
    datasets.Dataset.from_dict({"text": documents}).to_parquet(path / "a.parquet")
    return path / "a.parquet"


def as_txt(path: Path, documents: list[str]) -> Path:
    (path / "a.txt").write_text("\n\n".join(documents), encoding="utf-8")
    return path / "a.txt"


def as_directory(path: Path, documents: list[str]) -> Path:
    write_jsonl(path / "dir" / "1.jsonl", documents[:20])
    write_jsonl(path / "dir" / "2.jsonl", documents[20:])
    return path / "dir"


def as_saved(path: Path, documents: list[str]) -> Path:
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(path / "saved")
    return path / "saved"


def as_saved_splits(path: Path, documents: list[str]) -> Path:
    splits = {"test": ["no"], "train": documents}
    tables = {split: datasets.Dataset.from_dict({"text": texts}) for split, texts in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(path / "saved")
    return path / "saved"


def cache_as_hub_dataset(path: Path, splits: dict[str, list[str]]) -> None:
    """Leaves in the cache of `datasets`, in `path / "hf"`, what a download of `someone/something` leaves there."""
    files = {split: str(write_jsonl(path / "src" / f"{split}.jsonl", documents)) for split, documents in splits.items()}
    builder = datasets.load_dataset_builder("json", data_files=files)
    builder.download_and_prepare()
    folder = path / "hf" / "someone___something" / "default" / "0.0.0" / ("c0ffee" * 7)[:40]
    shutil.copytree(builder.cache_dir, folder)
    for file in folder.glob("json-*"):
        file.rename(file.with_name(file.name.replace("json-", "something-")))
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"dataset_name": "something", "config_name": "default"}
    for split in info["splits"].values():
        split["dataset_name"] = "something"
    (folder / "dataset_info.json").write_text(json.dumps(info))
