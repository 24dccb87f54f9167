"""Text to stored windows, and windows to the training loop: what packing adds to the bare tokenizer, and how long a
step waits for its batch.

    python benchmarks/bench_data.py --json data.json

Packing: documents that lie in memory become windows on the disk. A case with n threads has n of the tokenizer's, in a
process that may use n cores. The tokenizer is the default teacher's if it is on this disk, else one trained here. The
text is repeated, which is easy for a tokenizer, and so hard for packing.

encode_batch_fast        the tokenizer's fastest call, batch by batch; what it gives is dropped
encode_batch_fast, once  the same in one call
ours                     packing.write_token_file, flushed to the disk
ours, from jsonl         data.build_dataloader up to the first batch: reading the text from a file is included
per-document loop        one call per document, all ids in one list, cut into windows, saved
datasets.map             the usual way: map to ids, map to windows of groups, cached as Arrow; 1 or 2 processes

tokens_per_s counts the ends of text between documents. peak_bytes: memory above what was held before; that of
datasets.map with 2 processes is elsewhere, and not known.

Loading: a loop takes a batch and then sleeps for a step.

step                     the sleep itself
cached, n workers        data.CachedLoader; its file is evicted from memory before
DataLoader               what CachedLoader is made of, alone: it reads when the step asks
stream                   data.StreamingLoader
stream, not ahead        the same, but it reads and tokenises when the step asks

seconds: the mean wait for a batch, the first left out; ratio_to_baseline: as a share of the step. batches_per_s:
without the sleep.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT, Row, measure, parse_arguments, report, run_child

BARE, ONCE, STEP = "encode_batch_fast", "encode_batch_fast, once", "step"
SEQ_LEN = 1024  # of the windows that packing stores
GROUP = 1000  # documents, the default of datasets.map
VOCAB = 32000
PACKING = ["MB=20 characters=3000 threads=1", "MB=20 characters=3000 threads=2"]
PACKING_AT_THE_EDGES = ["MB=20 characters=100 threads=2", "MB=20 characters=5000000 threads=2"]
LOADING = ["MB=20 B=8 S=1024 step_ms=50 steps=250"]
QUICK_PACKING = ["MB=0.3 characters=1000 threads=1", "MB=0.3 characters=100 threads=2"]
QUICK_LOADING = ["MB=0.3 B=2 S=64 step_ms=2 steps=30"]


def main() -> None:
    options = parse_arguments(__doc__)
    everything, at_the_edges = list(PACK), [BARE, ONCE, "ours"]
    if options.quick:
        cases = {case: everything for case in QUICK_PACKING} | {case: list(LOAD) for case in QUICK_LOADING}
    else:
        cases = {case: everything for case in PACKING} | {case: at_the_edges for case in PACKING_AT_THE_EDGES}
        cases |= {case: list(LOAD) for case in LOADING}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = run_child(__file__, "prepare", folder)
        for case, candidates in cases.items():
            if not _named(case, options.cases):
                continue
            baseline = STEP if STEP in candidates else BARE
            candidates = [name for name in candidates if name == baseline or _named(name, options.candidates)]
            function = "load" if baseline == STEP else "pack"
            results = run_child(__file__, function, case, candidates, 1 if options.quick else options.rounds, folder)
            print(f"{case}: {results}", file=sys.stderr, flush=True)
            rows += rows_of_case(case, results, baseline)
    print("tokenizer:", tokenizer["name"])
    report(rows, options.json)


def _named(name: str, wanted: list[str] | None) -> bool:
    return wanted is None or any(part in name for part in wanted)


def rows_of_case(case: str, results: dict[str, list[Row]], baseline: str) -> list[Row]:
    """One row of medians for each candidate."""
    rows: list[Row] = []
    for candidate, rounds in results.items():
        medians = {key: statistics.median(result[key] for result in rounds) for key in rounds[0]}
        rows.append({"case": case, "candidate": candidate, **medians})
        if candidate == "datasets.map, 2 processes":
            rows[-1]["peak_bytes"] = None  # measured was the process that waits for the two
    base = next(row["seconds"] for row in rows if row["candidate"] == baseline)
    return [{**row, "ratio_to_baseline": row["seconds"] / base} for row in rows]


def sizes_of(case: str) -> dict[str, float]:
    return {key: float(value) for key, value in (part.split("=") for part in case.split())}


# --- text and tokenizer, made once ---------------------------------------------------------------------------


def read_text() -> str:
    """All real English at hand."""
    files = [ROOT / "presets/tiny/text/english.txt", *sorted(ROOT.parent.glob("shared/data/text/*.txt"))]
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files)


def prepare(folder: str) -> Row:
    """Leaves a tokenizer of real size in `folder`."""
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
    """Paragraphs, joined until they have so many characters, again and again until there are so many megabytes."""
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
    """What training would read from, for one rank."""
    import datasets

    from arguments import parse_train_args
    from data import build_dataloader

    datasets.config.HF_DATASETS_CACHE = cache
    args = parse_train_args(["--dataset_name", str(jsonl), "--local_files_only", *options.split()])
    return build_dataloader(args, tokenizer, rank=0, world_size=1, is_builder=True)


# --- packing -------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """What all candidates of a case are given. `folder` is empty each time."""

    documents: list[str]
    table: Any  # datasets.Dataset of the documents
    jsonl: Path
    tokenizer: Any
    encoder: Any  # packing.Encoder
    folder: Path


Windows = Sequence[Any]  # as they were stored, (S + 1,) each, not read yet


def pack(case: str, candidates: list[str], rounds: int, folder: str) -> dict[str, list[Row]]:
    """All candidates in one process, which from its start has the case's cores and tokenizer threads, no more."""
    sizes = sizes_of(case)
    threads = int(sizes["threads"])
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

    import datasets

    from packing import Encoder, text_batches

    datasets.disable_progress_bars()
    documents = make_documents(sizes["MB"], sizes["characters"])
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(tokenizer)
    jsonl = write_jsonl(documents, Path(folder, "documents.jsonl"))
    table = datasets.Dataset.from_dict({"text": documents})
    job = Job(documents, table, jsonl, tokenizer, encoder, Path(folder, "packed"))
    expected = np.concatenate([encoder(texts) for texts in text_batches(documents)])  # (tokens,)
    results: dict[str, list[Row]] = {candidate: [] for candidate in candidates}
    for _ in range(rounds):
        for candidate in candidates:
            stored: list[Windows] = []
            row = measure(partial(pack_once, PACK[candidate], job, stored))
            if candidate not in (BARE, ONCE):
                check_windows(candidate, stored[-1], expected, most_missing=1 + len(documents) // GROUP)
            speed = len(expected) / row["seconds"]
            results[candidate].append({**row, "tokens_per_s": speed})
    return results


def pack_once(form: Callable[[Job], Windows], job: Job, stored: list[Windows]) -> None:
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir()
    stored[:] = [form(job)]


def check_windows(candidate: str, stored: Windows, expected: np.ndarray, most_missing: int) -> None:
    """Raises ValueError if these are not the windows of `expected`, but for the partial one at the end of each group
    that datasets.map drops; behind the first of these its windows are others.
    """
    missing = len(expected) // (SEQ_LEN + 1) - len(stored)
    first = np.stack([np.asarray(window) for window in islice(stored, 10)])  # (10, S + 1)
    if not 0 <= missing <= most_missing or not np.array_equal(first.ravel(), expected[: first.size]):
        raise ValueError(f"{candidate} has not stored the windows of the text ({missing} are missing)")


def bare(job: Job) -> Windows:
    from packing import text_batches

    for texts in text_batches(job.documents):
        job.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return ()


def bare_once(job: Job) -> Windows:
    job.tokenizer.backend_tokenizer.encode_batch_fast(job.documents, add_special_tokens=False)
    return ()


def ours(job: Job) -> Windows:
    from packing import PackedTextDataset, write_token_file

    write_token_file(job.folder / "ours", job.documents, job.encoder, {})
    return PackedTextDataset(job.folder / "ours", SEQ_LEN)


def ours_from_jsonl(job: Job) -> Windows:
    options = f"--no_dataset_streaming --seq_length {SEQ_LEN} --dataset_cache_dir {job.folder}"
    loader = open_loader(job.jsonl, job.folder, job.tokenizer, options)
    next(iter(loader))
    return loader.batches.dataset


def per_document(job: Job) -> Windows:
    ids = []
    for document in job.documents:
        ids += job.tokenizer(document, add_special_tokens=False)["input_ids"]
        ids.append(job.tokenizer.eos_token_id)
    full = len(ids) // (SEQ_LEN + 1) * (SEQ_LEN + 1)
    np.save(job.folder / "windows.npy", np.array(ids[:full], job.encoder.dtype).reshape(-1, SEQ_LEN + 1))
    return np.load(job.folder / "windows.npy", mmap_mode="r")


def datasets_map(job: Job, processes: int) -> Windows:
    tokenizer, size = job.tokenizer, SEQ_LEN + 1

    def to_ids(rows: dict) -> dict:
        encoded = tokenizer(rows["text"], add_special_tokens=False, return_attention_mask=False)
        return {"ids": [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]}

    def to_windows(rows: dict) -> dict:
        ids = list(chain.from_iterable(rows["ids"]))
        return {"ids": [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]}

    table = job.table
    for step, function in enumerate((to_ids, to_windows)):
        table = table.map(
            function,
            batched=True,
            batch_size=GROUP,
            remove_columns=table.column_names,
            num_proc=processes if processes > 1 else None,
            cache_file_name=str(job.folder / f"step-{step}.arrow"),
            load_from_cache_file=False,
        )
    return table.with_format("numpy")["ids"]


PACK: dict[str, Callable[[Job], Windows]] = {
    BARE: bare,
    ONCE: bare_once,
    "ours": ours,
    "ours, from jsonl": ours_from_jsonl,
    "per-document loop": per_document,
    "datasets.map, 1 process": partial(datasets_map, processes=1),
    "datasets.map, 2 processes": partial(datasets_map, processes=2),
}


# --- loading -------------------------------------------------------------------------------------------------

Batches = Generator[Any, None, None]  # of this rank, in one epoch


def load(case: str, candidates: list[str], rounds: int, folder: str) -> dict[str, list[Row]]:
    sizes = sizes_of(case)
    steps, step_s = int(sizes["steps"]), sizes["step_ms"] / 1000
    documents = make_documents(sizes["MB"], characters=3000)
    jsonl = write_jsonl(documents, Path(folder, "documents.jsonl"))
    source = Source(documents, jsonl, load_tokenizer(folder), Path(folder, "cache"), int(sizes["B"]), int(sizes["S"]))
    results: dict[str, list[Row]] = {candidate: [] for candidate in candidates}
    for _ in range(rounds):
        for candidate in candidates:
            if candidate == STEP:
                results[candidate].append({"seconds": step_s, "peak_bytes": 0})
                continue
            row = measure(partial(draw, LOAD[candidate], source, steps))
            row |= time_waits(LOAD[candidate](source), steps, step_s)
            results[candidate].append(row)
    return results


def draw(form: Callable[["Source"], Batches], source: "Source", steps: int) -> Row:
    return {"batches_per_s": 1 / time_waits(form(source), steps, step_s=0.0)["seconds"]}


def time_waits(batches: Batches, steps: int, step_s: float) -> Row:
    """How long steps wait for their batches. The wait for the first is part of the start."""
    waits = []
    with closing(batches):
        next(batches)
        for _ in range(steps - 1):
            time.sleep(step_s)
            start = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - start)
    return {"seconds": statistics.mean(waits), "longest_wait_s": max(waits)}


@dataclass
class Source:
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
        """Its file leaves memory, as far as no other process has it open."""
        for file in self.cache.glob("packed/*/tokens.bin"):
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return self.open(f"--no_dataset_streaming --dataset_workers {workers}")


def cached(source: Source, workers: int) -> Batches:
    return iter(source.open_cached(workers))


def data_loader(source: Source) -> Batches:
    yield from source.open_cached(workers=0).batches


def stream(source: Source) -> Batches:
    return iter(source.open("--shuffle_buffer 0"))


def stream_not_ahead(source: Source) -> Batches:
    import torch

    from data import Batch
    from packing import Encoder, blocks, text_batches

    encoder = Encoder(source.tokenizer)
    arrays = (encoder(texts) for texts in text_batches(source.documents))
    for stack in blocks(arrays, source.batch_size * (source.seq_len + 1)):
        for block in stack:
            yield Batch.from_windows(torch.from_numpy(block.astype(np.int64)).view(source.batch_size, -1))


LOAD: dict[str, Callable[[Source], Batches]] = {
    STEP: lambda source: (batch for batch in ()),
    "cached, 0 workers": partial(cached, workers=0),
    "cached, 2 workers": partial(cached, workers=2),
    "DataLoader": data_loader,
    "stream": stream,
    "stream, not ahead": stream_not_ahead,
}


if __name__ == "__main__":
    main()
