"""Ranks behind slow links, on one machine: a network namespace for each, all on one bridge, and what each may send and
receive limited by the kernel. Linux, root, and the commands `ip` and `tc` of iproute2.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SWITCH, SUBNET = "hd-switch", "10.77.0"


def why_not() -> str | None:
    """Returns why this machine cannot have such links, or None."""
    if not all(map(shutil.which, ("ip", "tc"))):
        return "the commands ip and tc (iproute2) are not here"
    made = subprocess.run(["ip", "netns", "add", "hd-trial"], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces may not be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "hd-trial"], check=True)
    return None


def run(command: str) -> None:
    subprocess.run(command.split(), check=True)


def address(rank: int) -> str:
    return f"{SUBNET}.{rank + 10}"


def inside(rank: int) -> list[str]:
    """Returns what to write before a command to run it behind a rank's link, whose name there is eth0."""
    return ["ip", "netns", "exec", f"hd-rank{rank}"]


@contextmanager
def links(rates: list[str]) -> Iterator[None]:
    """Makes a rank's link for each rate, such as 200mbit, and removes them all at the end."""
    spaces = [SWITCH, *(f"hd-rank{rank}" for rank in range(len(rates)))]
    try:
        for space in spaces:
            run(f"ip netns add {space}")
            run(f"ip -n {space} link set lo up")
        run(f"ip -n {SWITCH} link add br0 type bridge")
        run(f"ip -n {SWITCH} link set br0 up")
        for rank, rate in enumerate(rates):
            space, port = f"hd-rank{rank}", f"port{rank}"
            run(f"ip -n {SWITCH} link add {port} type veth peer name eth0 netns {space}")
            run(f"ip -n {SWITCH} link set {port} master br0")
            run(f"ip -n {SWITCH} link set {port} up")
            run(f"ip -n {space} link set eth0 up")
            run(f"ip -n {space} addr add {address(rank)}/24 dev eth0")
            for place, device in ((SWITCH, port), (space, "eth0")):
                run(f"tc -n {place} qdisc add dev {device} root tbf rate {rate} burst 256kb latency 100ms")
        yield
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def received_bytes() -> int:
    """Returns the bytes that have come over the link of the namespace of this process."""
    statistics = Path("/sys/class/net/eth0/statistics/rx_bytes")
    if statistics.exists():
        return int(statistics.read_text())
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("eth0:"))
    return int(line.split(":")[1].split()[0])


def environment(rank: int, n_ranks: int, port: int = 29555) -> dict[str, str]:
    """Returns the environment of a rank behind its link, for torch.distributed."""
    ranks = {"RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n_ranks}
    network = {"MASTER_ADDR": address(0), "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": 1}
    return {**os.environ, **{name: str(value) for name, value in {**ranks, **network}.items()}}
