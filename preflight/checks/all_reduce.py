"""Times all-reduces of real processes for doctor.py. Each process loads this module, so it imports torch alone: that
takes less than half the time.
"""

import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

REPEATS = 5
SPAWN_WAIT_S = 120.0  # for all processes to finish


def all_reduce_rate(n_ranks: int, n_bytes: int, on_gpus: bool, patience_s: float = SPAWN_WAIT_S) -> float:
    """Returns a tensor's bytes by the median time of an all-reduce, in GB/s. Raises ValueError if the processes do not
    finish in `patience_s` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.spawn(_all_reduce, (n_ranks, n_bytes, on_gpus, folder), n_ranks, join=False)
        ends = time.monotonic() + patience_s
        while not context.join(timeout=1):
            if time.monotonic() > ends:
                for process in context.processes:
                    process.kill()
                    process.join()
                remedy = "try NCCL_P2P_DISABLE=1" if on_gpus else "check that /etc/hosts has the name of this host"
                raise ValueError(f"{n_ranks} processes have not finished within {patience_s:.0f} s; {remedy}")
        seconds = float((Path(folder) / "seconds").read_text())
    return n_bytes / seconds / 1e9


def _all_reduce(rank: int, n_ranks: int, n_bytes: int, on_gpus: bool, folder: str) -> None:
    """Runs in each process of `all_reduce_rate`."""
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
    tensor, seconds = torch.ones(n_bytes // 4, device=device), []
    for _ in range(1 + REPEATS):
        tensor.fill_(1.0)
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        value = tensor[0].item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
        if value != n_ranks:
            raise RuntimeError(f"the all-reduce of ones among {n_ranks} ranks gave {value}")
    if rank == 0:
        (Path(folder) / "seconds").write_text(str(statistics.median(seconds[1:])))
    dist.barrier()
    dist.destroy_process_group()
