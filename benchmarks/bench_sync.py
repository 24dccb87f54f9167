"""Measures the exchange of gradients and weights of an optimizer step where the link decides: real ranks, each in a
network namespace of its own, behind a link that the kernel limits in both directions. Models are small, an embedding of
which few rows are used, matrices, and a head; there is no work beside the exchange and AdamW.

allreduce       DDP and ZeroRedundancyOptimizer, as `--gradient_exchange allreduce`
owners          `--gradient_exchange owners`
owners, 8 bits  and 4 bits: with `--gradient_bits`
owners, one level  on several nodes, as if all ranks were on one
fsdp2           torch's fully_shard, for comparison; on gloo its reduce-scatter is an all-reduce inside
powersgd        torch's PowerSGD hook of rank 4 under DDP, with ZeroRedundancyOptimizer

seconds: of a step, the median over steps of the slowest rank. received_share: what a rank receives in a step, as a part
of the bytes of the trained weights; node_received_share: what a node receives from others, where there are several.
ratio: of seconds, to allreduce. same: whether all ranks have the same weights.

    python benchmarks/bench_sync.py [--rounds N] [--json FILE] [--quick]
"""

import functools
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import slow_links
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import ROOT, parse_options, report
from torch import nn

ONE_LEVEL = "owners, one level"
CANDIDATES = ["allreduce", "owners", "owners, 8 bits", "owners, 4 bits", ONE_LEVEL, "fsdp2", "powersgd"]
CASES = {f"{n} ranks, {rate} Mbit/s": slow_links.Layout(n, rate) for n in (2, 4) for rate in (200, 50)}
CASES["2 nodes of 2 ranks, 100 Mbit/s inside, 10 between"] = slow_links.Layout(4, 100, n_nodes=2, node_rate=10)
WIDTH, LAYERS, VOCAB, STEPS = 512, 12, 2048, 5  # 5.2 M weights, of which the embedding is 20 %
TOKENS = 64  # of a rank and step
LONGEST_S = 900  # of a candidate's steps


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return F.cross_entropy(self.head(x).float(), ids.roll(-1))


def main() -> None:
    options = parse_options(__doc__, CASES, CANDIDATES, CANDIDATES[:1])
    if reason := slow_links.why_not():
        print(f"nothing is measured: {reason}")
        return
    found: dict[tuple[str, str], list[dict]] = {}
    for case in options.cases:
        layout = CASES[case]
        candidates = [name for name in options.candidates if layout.n_nodes > 1 or name != ONE_LEVEL]
        with slow_links.links(layout):
            for _ in range(options.rounds):
                for candidate in candidates:
                    found.setdefault((case, candidate), []).append(run(layout, candidate))
                    print(f"{case}, {candidate}: {found[case, candidate][-1]}", file=sys.stderr, flush=True)
    report([row(found, *key) for key in found], options.json)


def row(found: dict[tuple[str, str], list[dict]], case: str, candidate: str) -> dict:
    """Returns the medians of a candidate over rounds."""
    rounds, baseline = found[case, candidate], found[case, CANDIDATES[0]]
    if problems := [one["problem"] for one in [*rounds, *baseline] if "problem" in one]:
        return {"case": case, "candidate": candidate, "problem": problems[0]}
    ratios = [one["seconds"] / other["seconds"] for one, other in zip(rounds, baseline, strict=True)]
    names = [name for name in rounds[0] if name != "same"]
    figures = {name: statistics.median(one[name] for one in rounds) for name in names}
    same = all(one["same"] for one in rounds)
    return {"case": case, "candidate": candidate, **figures, "ratio": statistics.median(ratios), "same": same}


def run(layout: slow_links.Layout, candidate: str) -> dict:
    """Runs the ranks, and returns what they measured, the slowest one's seconds."""
    n_local = layout.n_ranks if candidate == ONE_LEVEL else layout.ranks_per_node
    ranks = [
        subprocess.Popen(
            [*slow_links.inside(rank), sys.executable, __file__, "--rank-of", candidate, node_of(rank, layout)],
            env=slow_links.environment(rank, layout.n_ranks, n_local) | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(layout.n_ranks)
    ]
    try:
        outputs = [rank.communicate(timeout=LONGEST_S) for rank in ranks]
    except subprocess.TimeoutExpired:
        return {"problem": f"its ranks took more than {LONGEST_S} s"}
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        return {"problem": outputs[0][1].strip().splitlines()[-1][:200]}
    results = [json.loads(text.splitlines()[-1]) for text, _ in outputs]
    most = {name: max(one[name] for one in results) for name in results[0] if name != "hash"}
    return {**most, "same": len({one["hash"] for one in results}) == 1}


def node_of(rank: int, layout: slow_links.Layout) -> str:
    """Returns the number of a rank's node, if there are several, for its command line."""
    return str(layout.node_of(rank)) if layout.n_nodes > 1 else ""


# --- a rank --------------------------------------------------------------------------------------------------


def rank_main(candidate: str, node: str) -> None:
    """Takes the steps of a rank and prints what it measured."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Words().to(torch.bfloat16)
    trained = sum(parameter.nbytes for parameter in model.parameters())
    step = BUILD[candidate.split(",")[0]](model, candidate)
    counters = {"received_share": slow_links.received_bytes}
    if node:
        counters["node_received_share"] = functools.partial(slow_links.received_by_node, int(node))
    seconds, received = [], []
    for i in range(STEPS + 1):
        ids = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(100 * i + dist.get_rank()))
        before = [count() for count in counters.values()]
        dist.barrier()
        start = time.perf_counter()
        step(ids)
        seconds.append(time.perf_counter() - start)
        dist.barrier()
        received.append([count() - was for count, was in zip(counters.values(), before, strict=True)])
        dist.barrier()  # all have counted before anyone goes on
    shares = [statistics.median(values) / trained for values in zip(*received[1:], strict=True)]
    figures = {"seconds": statistics.median(seconds[1:]), **dict(zip(counters, shares, strict=True))}
    print(json.dumps({**figures, "hash": hash_of(model)}), flush=True)
    dist.destroy_process_group()


def hash_of(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        digest.update(whole.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def build_allreduce(model: nn.Module, candidate: str) -> Callable[[torch.Tensor], None]:
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    from distillation.exchange import AllReduce
    from training_utils import build_optimizer

    # PowerSGD's collectives start in another order on each rank where there are several buckets.
    size = {"bucket_cap_mb": 10**4} if candidate == "powersgd" else {}
    ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, **size)
    if candidate == "powersgd":
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return stepping(ddp, AllReduce(model, build_optimizer(model, 1e-5, 0.1, master_weights=True)))


def build_owners(model: nn.Module, candidate: str) -> Callable[[torch.Tensor], None]:
    from distillation.owners import Owners
    from training_utils import parameter_groups

    bits = int(candidate.split()[1]) if candidate.endswith("bits") else 16
    groups = parameter_groups(model, 0.1)
    order = list(model.parameters())[::-1]
    return stepping(model, Owners(order, groups, 1e-5, True, model.embedding.weight, bits, bucket_bytes=2**20))


def build_fsdp2(model: nn.Module, candidate: str) -> Callable[[torch.Tensor], None]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    model.float()
    for layer in (*model.layers, model):
        fully_shard(layer, mp_policy=policy, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)

    def step(ids: torch.Tensor) -> None:
        model(ids).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def stepping(forward: nn.Module, exchange) -> Callable[[torch.Tensor], None]:
    def step(ids: torch.Tensor) -> None:
        exchange.begin(is_last=True)
        forward(ids).backward()
        exchange.step(min(1.0, 1.0 / exchange.norm()))
        exchange.clear()

    return step


BUILD = {"allreduce": build_allreduce, "powersgd": build_allreduce, "owners": build_owners, "fsdp2": build_fsdp2}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank-of"]:
        rank_main(*sys.argv[2:4])
    else:
        main()
