"""Whole training steps side by side: ours, a plain loop of the original design (plain_loop.py), and TRL's trainers, on
the same random models and the same windows of tokens; tokens per second and memory on CPU.

    python benchmarks/bench_step.py --json step.json

A step is teacher forward, student forward, backward, clipping and AdamW, in float32. The bodies are tiny (4 layers):
the vocabulary decides.

ours               train_gpus.distil with its default options: hidden states from the teacher, one batch ahead, fused
                   loss of CE and KL, AdamW in ZeRO shards.
ours --compile     the same, with that option: blocks and loss under torch.compile.
plain loop         full logits broadcast to all ranks, float32 loss of CE and KL over them, AdamW in ZeRO shards.
trl gkd            GKDTrainer off-policy (lmbda 0): forward KL over full logits, no CE; a teacher on every rank, AdamW
                   whole on every rank.
trl distillation   DistillationTrainer: forward KL in chunks of the vocabulary, no CE; teacher and AdamW as GKD. It
                   learns from what it generates; here the windows stand in the place of that.

Both TRL trainers run the models on whole windows, one token more than the others. They are given no gradient
checkpointing and no bfloat16, which they would have by default and the others do not.

seconds, tokens_per_s: the median step of a run but for its first and its last (which has no next batch to ask the
teacher about), with a caching allocator; default_*: with glibc's. peak_bytes: a rank's highest resident memory less
what it held before the first step, on the rank where that is most. It has gradients and AdamW's moments in it, which
no candidate holds before the first step, and not the models' weights. loss, kl, ce: of the first step, averaged over
ranks; a candidate that has one of them must have the baseline's.
"""

import math
import os
import statistics
from dataclasses import dataclass

import torch
from harness import NotInstalled, Row, need, parse_arguments, report, run_rounds
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

BASELINE = "plain loop"
CANDIDATES = (BASELINE, "ours", "ours --compile", "trl gkd", "trl distillation")
CASES = [f"V={vocab} ranks={ranks}" for vocab in (32000, 128256) for ranks in (1, 2)]
QUICK_CASES = [f"V=1000 ranks={ranks} d_model=64 seq_len=32" for ranks in (1, 2)]
STEPS = 5  # of one run; the first and the last are not timed
TOLERANCE = 1e-5  # relative, between first losses: float32 sums in another order


@dataclass(frozen=True)
class Case:
    """What a case's name says."""

    vocab: int
    ranks: int
    d_model: int = 256
    seq_len: int = 512
    batch_size: int = 2

    @classmethod
    def parse(cls, name: str) -> "Case":
        sizes = {key: int(value) for key, value in (part.split("=") for part in name.split())}
        return cls(vocab=sizes.pop("V"), **sizes)

    @property
    def tokens(self) -> int:
        """That a step learns from, on all ranks."""
        return self.ranks * self.batch_size * self.seq_len


def main() -> None:
    options = parse_arguments(__doc__)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all of it is on the CPU, on a machine with GPUs too
    candidates = [name for name in CANDIDATES if name in (BASELINE, *(options.candidates or CANDIDATES))]
    cases = {
        case: candidates
        for case in (QUICK_CASES if options.quick else CASES)
        if any(part in case for part in options.cases or [""])
    }
    rows = run_rounds(__file__, cases, 1 if options.quick else options.rounds, BASELINE)
    for row in rows:
        add_tokens_per_s(row)
    check_losses(rows)
    report(rows, options.json)


def add_tokens_per_s(row: Row) -> None:
    tokens = Case.parse(row["case"]).tokens
    for kind in ("", "default_"):
        if row.get(f"{kind}seconds"):
            row[f"{kind}tokens_per_s"] = tokens / row[f"{kind}seconds"]


def check_losses(rows: list[Row]) -> None:
    """Raises ValueError where two candidates claim the same figure of the first step and do not have it."""
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
    """All ranks of one candidate, as torchrun would start them; their figures in one."""
    if candidate.startswith("trl"):
        need("trl")
    if candidate.endswith("--compile"):
        need_compiler()
    ranks = Case.parse(case).ranks
    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // ranks))
    launch = LaunchConfig(1, 1, ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    results = list(elastic_launch(launch, run_rank)(case, candidate).values())
    row = {name: statistics.mean(result[name] for result in results) for name in results[0]}
    return row | {"peak_bytes": max(result["peak_bytes"] for result in results)}


def need_compiler() -> None:
    from processes.devices import can_compile

    if not can_compile("cpu"):
        raise NotInstalled("a C++ compiler")


def run_rank(case: str, candidate: str) -> Row:
    """One rank of it, in a process of its own."""
    from step_candidates import train

    return train(Case.parse(case), candidate)


if __name__ == "__main__":
    main()
