"""Whole training steps side by side: ours, a plain loop of the original design (plain_loop.py), and TRL's trainers, on
the same random models and the same windows of tokens; tokens per second and memory on CPU.

    python benchmarks/bench_step.py --json step.json

A step is teacher forward, student forward, backward, clipping and AdamW, in float32. The models have 4 small layers, so
that the vocabulary decides the time.

ours               train_gpus.distil with its default options: hidden states from the teacher, one batch ahead, fused
                   loss of CE and KL, AdamW in ZeRO shards.
ours --compile     the same, with that option: blocks and loss under torch.compile.
plain loop         full logits broadcast to all ranks, float32 loss of CE and KL over them, AdamW in ZeRO shards.
trl gkd            GKDTrainer off-policy (lmbda 0): forward KL over full logits, no CE; a teacher on every rank, AdamW
                   whole on every rank.
trl distillation   DistillationTrainer: forward KL in chunks of the vocabulary, no CE; teacher and AdamW as GKD. It
                   would train on what it generates; here it trains on the windows instead.

Both TRL trainers run the models on whole windows, one token more than the others. Their
defaults, gradient checkpointing and bfloat16, are switched off, since the others have neither.

seconds, tokens_per_s: the median step of a run without its first and its last (which has no next batch to ask the
teacher about), with a caching allocator; default_*: with glibc's. peak_bytes: a rank's highest resident memory less
what it held before the first step, on the rank where that is most: gradients and AdamW's moments are included, the
models' weights are not. loss, kl, ce: of the first step, averaged over ranks; each must equal the baseline's.
"""

import math
import os
import statistics

import torch
from harness import Row, need, need_compiler, parse_options, report, run_rounds
from step_case import Case
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

BASELINE = "plain loop"
CANDIDATES = (BASELINE, "ours", "ours --compile", "trl gkd", "trl distillation")
CASES = [f"V={vocab} ranks={ranks}" for vocab in (32000, 128256) for ranks in (1, 2)]
QUICK_CASES = [f"V=1000 ranks={ranks} d_model=64 seq_len=32" for ranks in (1, 2)]
TOLERANCE = 1e-5  # relative, between first losses: float32 sums in another order


def main() -> None:
    options = parse_options(__doc__, CASES, CANDIDATES, [BASELINE], QUICK_CASES)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the CPU is measured, on a machine with GPUs too
    rows = run_rounds(__file__, dict.fromkeys(options.cases, options.candidates), options.rounds, BASELINE)
    for row in rows:
        add_tokens_per_s(row)
    check_losses(rows)
    report(rows, options.json)


def add_tokens_per_s(row: Row) -> None:
    """Adds tokens per second, over all ranks, beside each of the row's seconds."""
    tokens = Case.parse(row["case"]).tokens
    for kind in ("", "default_"):
        if row.get(f"{kind}seconds"):
            row[f"{kind}tokens_per_s"] = tokens / row[f"{kind}seconds"]


def check_losses(rows: list[Row]) -> None:
    """Raises ValueError where a loss of the first step differs from the baseline's: that is not the same work."""
    for row in rows:
        base = next(base for base in rows if (base["case"], base["candidate"]) == (row["case"], BASELINE))
        for name in ("loss", "kl", "ce"):
            if name in row and not math.isclose(row[name], base[name], rel_tol=TOLERANCE):
                raise ValueError(
                    f"{row['case']}: the first {name} of {row['candidate']!r} is {row[name]}, that of {BASELINE!r} is "
                    f"{base[name]}: they do not do the same work"
                )


# --- one run, in a process of its own ------------------------------------------------------------------------


def run(case: str, candidate: str) -> Row:
    """Runs all ranks of a candidate, started as torchrun does. Returns their means, and the largest peak."""
    if candidate.startswith("trl"):
        need("trl")
    if candidate.endswith("--compile"):
        need_compiler("cpu")
    ranks = Case.parse(case).ranks
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // ranks))
    launch = LaunchConfig(1, 1, ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    results = list(elastic_launch(launch, run_rank)(case, candidate).values())
    row = {name: statistics.mean(result[name] for result in results) for name in results[0]}
    return row | {"peak_bytes": max(result["peak_bytes"] for result in results)}


def run_rank(case: str, candidate: str) -> Row:
    """Runs one rank, in a process of its own."""
    from step_candidates import train

    return train(Case.parse(case), candidate)


if __name__ == "__main__":
    main()
