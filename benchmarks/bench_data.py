"""Text to stored windows, and windows to the training loop: what packing adds to the bare tokenizer, and how long a
step waits for its batch.

    python benchmarks/bench_data.py --json data.json

Packing: documents in memory become windows on the disk. A case with n threads has n tokenizer threads, in a process
that may use n cores. The tokenizer is the default teacher's if it is on this disk, else one trained here. The text is
repeated: that makes tokenising cheaper than usual, and packing's share of the time larger.

encode_batch_fast        the tokenizer's fastest call, batch by batch; its result is dropped
encode_batch_fast, once  the same in one call
ours                     text.token_file.write_token_file, flushed to the disk
ours, from jsonl         data.build_dataloader up to the first batch: reading the text from a file is included
per-document loop        one call per document, all ids in one list, cut into windows, saved
datasets.map             the usual way: map to ids, map to windows of groups, cached as Arrow; 1 or 2 processes

tokens_per_s counts the end-of-text tokens between documents. peak_bytes: memory above what was held before; that of
datasets.map with 2 processes is in other processes, and not measured.

Loading: a loop takes a batch and then sleeps for a step.

step                     the sleep itself
cached, n workers        data.build_dataloader with a cached file, which is evicted from memory before
DataLoader               the DataLoader inside it, alone: it reads when the step asks
stream                   data.build_dataloader with a stream
stream, not ahead        the same, but it reads and tokenises when the step asks

seconds: the mean wait for a batch, the first left out; ratio_to_baseline: as a share of the step. batches_per_s:
without the sleep.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from data_candidates import (
    BARE,
    GROUP,
    LOAD,
    ONCE,
    PACK,
    SEQ_LEN,
    TWO_PROCESSES,
    Batches,
    LoadInputs,
    PackInputs,
    Windows,
    load_tokenizer,
    make_documents,
    write_jsonl,
)
from harness import Row, measure, parse_options, report, run_child

STEP = "step"
PACKING = ["MB=20 characters=3000 threads=1", "MB=20 characters=3000 threads=2"]
PACKING_AT_THE_EDGES = ["MB=20 characters=100 threads=2", "MB=20 characters=5000000 threads=2"]
LOADING = ["MB=20 B=8 S=1024 step_ms=50 steps=250"]
QUICK_PACKING = ["MB=0.1 characters=1000 threads=2"]
QUICK_LOADING = ["MB=0.1 B=2 S=64 step_ms=2 steps=30"]


def main() -> None:
    candidates_of: dict[str, list[str]] = dict.fromkeys(PACKING + QUICK_PACKING, [*PACK])
    candidates_of |= dict.fromkeys(PACKING_AT_THE_EDGES, [BARE, ONCE, "ours"])
    candidates_of |= dict.fromkeys(LOADING + QUICK_LOADING, [STEP, *LOAD])
    cases, quick_cases = PACKING + PACKING_AT_THE_EDGES + LOADING, QUICK_PACKING + QUICK_LOADING
    options = parse_options(__doc__, cases, [*PACK, STEP, *LOAD], [BARE, STEP], quick_cases)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = run_child("data_candidates.py", "prepare", folder)
        for case in options.cases:
            candidates = [name for name in candidates_of[case] if name in options.candidates]
            function, baseline = ("load", STEP) if STEP in candidates else ("pack", BARE)
            results = run_child(__file__, function, case, candidates, options.rounds, folder)
            print(f"{case}: {results}", file=sys.stderr, flush=True)
            rows += rows_of_case(case, results, baseline)
    print("tokenizer:", tokenizer["name"])
    report(rows, options.json)


def rows_of_case(case: str, results: dict[str, list[Row]], baseline: str) -> list[Row]:
    """Returns one row of medians for each candidate."""
    rows: list[Row] = []
    for candidate, rounds in results.items():
        medians = {key: statistics.median(result[key] for result in rounds) for key in rounds[0]}
        rows.append({"case": case, "candidate": candidate, **medians})
        if candidate == TWO_PROCESSES:
            rows[-1]["peak_bytes"] = None  # only the process that waits for the two was measured
    base = next(row["seconds"] for row in rows if row["candidate"] == baseline)
    return [{**row, "ratio_to_baseline": row["seconds"] / base} for row in rows]


def sizes_of(case: str) -> dict[str, float]:
    return {key: float(value) for key, value in (part.split("=") for part in case.split())}


# --- packing -------------------------------------------------------------------------------------------------


def pack(case: str, candidates: list[str], rounds: int, folder: str) -> dict[str, list[Row]]:
    """Measures all candidates in one process, which from its start has the case's cores and tokenizer threads only."""
    sizes = sizes_of(case)
    threads = int(sizes["threads"])
    os.environ |= {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])

    import datasets

    from text.encoding import Encoder, text_batches

    datasets.disable_progress_bars()
    documents = make_documents(sizes["MB"], sizes["characters"])
    tokenizer = load_tokenizer(folder)
    encoder = Encoder(tokenizer)
    jsonl = write_jsonl(documents, Path(folder, "documents.jsonl"))
    table = datasets.Dataset.from_dict({"text": documents})
    inputs = PackInputs(documents, table, jsonl, tokenizer, encoder, Path(folder, "packed"))
    expected = np.concatenate([encoder(texts) for texts in text_batches(documents)])  # (tokens,)
    results: dict[str, list[Row]] = {candidate: [] for candidate in candidates}
    for _ in range(rounds):
        for candidate in candidates:
            stored: list[Windows] = []
            row = measure(partial(pack_once, PACK[candidate], inputs, stored))
            if candidate not in (BARE, ONCE):
                check_windows(candidate, stored[-1], expected, most_missing=1 + len(documents) // GROUP)
            speed = len(expected) / row["seconds"]
            results[candidate].append({**row, "tokens_per_s": speed})
    return results


def pack_once(form: Callable[[PackInputs], Windows], inputs: PackInputs, stored: list[Windows]) -> None:
    shutil.rmtree(inputs.folder, ignore_errors=True)
    inputs.folder.mkdir()
    stored[:] = [form(inputs)]


def check_windows(candidate: str, stored: Windows, expected: np.ndarray, most_missing: int) -> None:
    """Raises ValueError unless the first ten windows are those of `expected` and at most `most_missing` are missing.
    datasets.map drops the partial window at the end of each group, so its later windows are shifted.
    """
    missing = len(expected) // (SEQ_LEN + 1) - len(stored)
    first = np.stack([np.asarray(window) for window in islice(stored, 10)])  # (10, S + 1)
    if not 0 <= missing <= most_missing or not np.array_equal(first.ravel(), expected[: first.size]):
        raise ValueError(f"{candidate} has not stored the windows of the text ({missing} are missing)")


# --- loading -------------------------------------------------------------------------------------------------


def load(case: str, candidates: list[str], rounds: int, folder: str) -> dict[str, list[Row]]:
    sizes = sizes_of(case)
    steps, step_s = int(sizes["steps"]), sizes["step_ms"] / 1000
    documents = make_documents(sizes["MB"], characters=3000)
    jsonl = write_jsonl(documents, Path(folder, "documents.jsonl"))
    inputs = LoadInputs(
        documents, jsonl, load_tokenizer(folder), Path(folder, "cache"), int(sizes["B"]), int(sizes["S"])
    )
    results: dict[str, list[Row]] = {candidate: [] for candidate in candidates}
    for _ in range(rounds):
        for candidate in candidates:
            if candidate == STEP:
                results[candidate].append({"seconds": step_s, "peak_bytes": 0})
                continue
            row = measure(partial(draw, LOAD[candidate], inputs, steps))
            row |= time_waits(LOAD[candidate](inputs), steps, step_s)
            results[candidate].append(row)
    return results


def draw(form: Callable[[LoadInputs], Batches], inputs: LoadInputs, steps: int) -> Row:
    return {"batches_per_s": 1 / time_waits(form(inputs), steps, step_s=0.0)["seconds"]}


def time_waits(batches: Batches, steps: int, step_s: float) -> Row:
    """Returns the mean and longest wait for a batch, in seconds. The wait for the first belongs to the start."""
    waits = []
    with closing(batches):
        next(batches)
        for _ in range(steps - 1):
            time.sleep(step_s)
            start = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - start)
    return {"seconds": statistics.mean(waits), "longest_wait_s": max(waits)}


if __name__ == "__main__":
    main()
