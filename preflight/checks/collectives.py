"""Times collectives of real processes for doctor.py. Each process loads this module, so it imports torch alone: that
takes less than half the time.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

REPEATS = 5
SPAWN_WAIT_S = 120.0  # for all processes to finish


def collective_rates(n_ranks: int, n_bytes: int, on_gpus: bool, patience_s: float = SPAWN_WAIT_S) -> dict[str, float]:
    """Returns by collective how many GB/s a rank receives: bytes that others send it in the best of ways, by the median
    time. n_bytes: of the tensor that is summed, scattered, gathered or exchanged. Raises ValueError if the processes do
    not finish in `patience_s` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.spawn(_time_all, (n_ranks, n_bytes, on_gpus, folder), n_ranks, join=False)
        ends = time.monotonic() + patience_s
        while not context.join(timeout=1):
            if time.monotonic() > ends:
                for process in context.processes:
                    process.kill()
                    process.join()
                remedy = "try NCCL_P2P_DISABLE=1" if on_gpus else "check that /etc/hosts has the name of this host"
                raise ValueError(f"{n_ranks} processes have not finished within {patience_s:.0f} s; {remedy}")
        seconds = json.loads((Path(folder) / "seconds").read_text())
    part = n_bytes * (n_ranks - 1) / n_ranks
    return {name: part * (2 if name == "all_reduce" else 1) / s / 1e9 for name, s in seconds.items()}


def _time_all(rank: int, n_ranks: int, n_bytes: int, on_gpus: bool, folder: str) -> None:
    """Runs in each process of `collective_rates`."""
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=n_ranks,
        timeout=timedelta(seconds=SPAWN_WAIT_S),
    )
    collectives = _collectives(rank, n_ranks, n_bytes, device)
    seconds = {name: _time(name, collective) for name, collective in collectives.items()}
    if rank == 0:
        (Path(folder) / "seconds").write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


class Collective(NamedTuple):
    """Holds a collective: what fills its tensors before, how it runs, where its result is, and what that has to be."""

    prepare: Callable[[], object]
    run: Callable[[], object]
    result: Tensor
    expected: Tensor


def _collectives(rank: int, n_ranks: int, n_bytes: int, device: torch.device) -> dict[str, Collective]:
    """Returns collectives by name. In each, a rank gives others numbers that tell both ranks and the place."""
    places = torch.arange(n_bytes // 4 // n_ranks, device=device) % 1000  # (P,)
    ranks = torch.arange(n_ranks, device=device)[:, None]  # (R, 1)

    def numbers(of_ranks: Tensor, times: int = 1) -> Tensor:
        return (1000 * of_ranks + times * places).int().flatten()  # (R * P,) or (P,)

    given = numbers(rank * n_ranks + ranks)  # whole numbers, whose sums are exact
    whole, own = torch.empty_like(given), torch.empty_like(given[: len(places)])
    sums = n_ranks * n_ranks * (n_ranks - 1) // 2 + n_ranks * ranks  # over ranks, of what each gives

    def spoil(result: Tensor) -> Callable[[], object]:
        return lambda: result.fill_(-1)  # so that what was there before does not pass for what arrives

    return {
        "all_reduce": Collective(
            lambda: whole.copy_(given), lambda: dist.all_reduce(whole), whole, numbers(sums, n_ranks)
        ),
        "reduce_scatter_tensor": Collective(
            spoil(own), lambda: dist.reduce_scatter_tensor(own, given), own, numbers(sums[rank], n_ranks)
        ),
        "all_gather_into_tensor": Collective(
            spoil(whole),
            lambda: dist.all_gather_into_tensor(whole, given[: len(places)]),
            whole,
            numbers(n_ranks * ranks),
        ),
        "all_to_all_single": Collective(
            spoil(whole), lambda: dist.all_to_all_single(whole, given), whole, numbers(n_ranks * ranks + rank)
        ),
    }


def _time(name: str, collective: Collective) -> float:
    """Returns the median seconds. Raises RuntimeError if the result is not the expected one."""
    seconds = []
    for _ in range(1 + REPEATS):
        collective.prepare()
        dist.barrier()
        begin = time.perf_counter()
        collective.run()
        collective.result[0].item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    if not torch.equal(collective.result, collective.expected):
        wrong = (collective.result != collective.expected).float().mean().item()
        raise RuntimeError(f"{name}: {wrong:.2%} of what arrived is not what was sent")
    return statistics.median(seconds[1:])
