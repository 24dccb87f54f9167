"""How ranks reach each other by NCCL: the way that its settings leave, about how fast that is, and which settings to
try.

Rates are bytes per second that a rank receives, in a ring, as users and NCCL's makers report them: estimates, until
`doctor.py --collectives` has measured them.
"""

import os
import re
import shutil
import subprocess
from typing import NamedTuple

import torch

GB = 1e9
SOCKETS, HOST_MEMORY, PCIE, NVLINK, NETWORK = "sockets", "host memory", "PCIe", "NVLink", "the network"
RATES = {
    SOCKETS: 3.5 * GB,  # 2 to 5 (NVIDIA/nccl#209); the slowest socket times their number (NVIDIA/nccl-tests#83)
    HOST_MEMORY: 7.5 * GB,  # 6 to 9 (NVIDIA/nccl#406)
    PCIE: 20 * GB,  # between GPUs; 4.0 with all its lanes
    NVLINK: 300 * GB,  # of an H100's 450 each way
    NETWORK: 25 * GB,  # between nodes: 200 Gbit/s
}
GIVEN = "--link_gb_per_s"
NO_P2P, NO_SHM, NO_IB = "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE"
SOCKET_SETTINGS = {"NCCL_SOCKET_NTHREADS": 4, "NCCL_NSOCKS_PERTHREAD": 4}
CHANNEL_LIMITS = ("NCCL_MAX_NCHANNELS", "NCCL_MAX_NRINGS", "NCCL_MAX_CTAS", "NCCL_MAX_P2P_NCHANNELS")


class Link(NamedTuple):
    """Holds how fast a rank receives from others, in bytes per second, and where that is from."""

    rate: float
    source: str


def find_link(gb_per_s: float | None, n_nodes: int) -> Link:
    """Returns the link of the slowest two neighbours among the ranks. gb_per_s: what the options say, if they do."""
    if gb_per_s is not None:
        return Link(gb_per_s * GB, GIVEN)
    way = min(ways(n_nodes), key=RATES.__getitem__)
    found = [f"{name}={os.environ[name]}" for name in (NO_P2P, NO_SHM, NO_IB) if is_on(name)]
    reason = f"by {', '.join(found)}" if found else "no setting forbids it"
    if way == PCIE and not torch.cuda.device_count():
        reason = "no GPU is visible here"
    return Link(RATES[way], f"estimated for {way}, {reason}")


def ways(n_nodes: int) -> list[str]:
    """Returns the ways between GPUs of a node, and between nodes if there are several."""
    between = [] if n_nodes == 1 else [SOCKETS if is_on(NO_IB) else NETWORK]
    return [way_inside(), *between]


def way_inside() -> str:
    """Returns how NCCL goes from GPU to GPU of a node. Without visible GPUs they are taken to reach each other."""
    n_gpus = torch.cuda.device_count()
    if is_on(NO_P2P) or (n_gpus > 1 and not torch.cuda.can_device_access_peer(0, 1)):
        return SOCKETS if is_on(NO_SHM) else HOST_MEMORY
    return NVLINK if n_gpus > 1 and has_nvlink() else PCIE


def is_on(name: str) -> bool:
    """Returns whether an environment variable switches something on."""
    return os.environ.get(name, "0") not in ("", "0")


def has_nvlink() -> bool:
    """Returns whether nvidia-smi names NVLink between any two GPUs: NV1 and more in its table."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        found = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return re.search(r"\bNV\d+\b", found.stdout) is not None


def settings_to_try(n_nodes: int = 1) -> list[str]:
    """Returns what could make the link faster, what should come first before the rest; only what applies here."""
    tries = []
    if way_inside() == SOCKETS:
        tries.append(
            f"unset {NO_SHM} first: ranks of a node then exchange through its memory and PCIe, 6 to 9 GB/s. NCCL 2.24 "
            "with a driver for CUDA 12.6 needs no room in /dev/shm for that, which is why it was often set"
        )
    missing = [f"{name}={value}" for name, value in SOCKET_SETTINGS.items() if name not in os.environ]
    if SOCKETS in ways(n_nodes) and missing:
        tries.append(f"where sockets must stay, export {' '.join(missing)}: NCCL then uses several at a time")
    limits = [name for name in CHANNEL_LIMITS if name in os.environ]
    if limits:
        tries.append(f"unset {' '.join(limits)}: each channel moves a part of the data, beside the others")
    return tries
