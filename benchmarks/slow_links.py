"""Ranks behind slow links, on one machine: a network namespace for each, all on one bridge, and what each may send and
receive limited by the kernel. With several nodes each has a bridge of its own, for its ranks and a limited uplink to
the bridge of all. Linux, root, and the commands `ip` and `tc` of iproute2.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SWITCH, SUBNET, UPLINK = "hd-switch", "10.77.0", "uplink"


class Layout(NamedTuple):
    """Says how many ranks there are and what links carry, in Mbit/s each way: a rank's, and a node's to the others."""

    n_ranks: int
    rate: int
    n_nodes: int = 1
    node_rate: int = 0

    @property
    def ranks_per_node(self) -> int:
        return self.n_ranks // self.n_nodes

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node


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


def node_space(node: int) -> str:
    return f"hd-node{node}"


@contextmanager
def links(layout: Layout) -> Iterator[None]:
    """Makes the links of all ranks, and removes them all at the end."""
    nodes = [node_space(node) for node in range(layout.n_nodes if layout.n_nodes > 1 else 0)]
    ranks = [f"hd-rank{rank}" for rank in range(layout.n_ranks)]
    try:
        for space in (SWITCH, *nodes, *ranks):
            run(f"ip netns add {space}")
            run(f"ip -n {space} link set lo up")
        for space in (SWITCH, *nodes):
            run(f"ip -n {space} link add br0 type bridge")
            run(f"ip -n {space} link set br0 up")
        for i, space in enumerate(nodes):
            join(SWITCH, f"node{i}", space, UPLINK, layout.node_rate)
            run(f"ip -n {space} link set {UPLINK} master br0")
        for rank, space in enumerate(ranks):
            join(nodes[layout.node_of(rank)] if nodes else SWITCH, f"port{rank}", space, "eth0", layout.rate)
            run(f"ip -n {space} addr add {address(rank)}/24 dev eth0")
        yield
    finally:
        for space in (SWITCH, *nodes, *ranks):
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def join(bridge: str, port: str, space: str, device: str, rate: int) -> None:
    """Joins a namespace to a bridge's, by a cable between two devices that carries so many Mbit/s each way."""
    run(f"ip -n {bridge} link add {port} type veth peer name {device} netns {space}")
    run(f"ip -n {bridge} link set {port} master br0")
    for place, end in ((bridge, port), (space, device)):
        run(f"ip -n {place} link set {end} up")
        run(f"tc -n {place} qdisc add dev {end} root tbf rate {rate}mbit burst 256kb latency 100ms")


def received_by_node(node: int) -> int:
    """Returns the bytes that have come over a node's uplink."""
    command = ["ip", "netns", "exec", node_space(node), "cat", "/proc/net/dev"]
    return bytes_in(subprocess.run(command, check=True, capture_output=True, text=True).stdout, UPLINK)


def received_bytes() -> int:
    """Returns the bytes that have come over the link of the namespace of this process."""
    return bytes_in(Path("/proc/net/dev").read_text(), "eth0")


def bytes_in(table: str, device: str) -> int:
    """Returns what a device has received, by the table of /proc/net/dev."""
    line = next(line for line in table.splitlines() if line.strip().startswith(f"{device}:"))
    return int(line.split(":")[1].split()[0])


def environment(rank: int, n_ranks: int, ranks_per_node: int, port: int = 29555) -> dict[str, str]:
    """Returns the environment of a rank behind its link, for torch.distributed."""
    place = {"LOCAL_RANK": rank % ranks_per_node, "LOCAL_WORLD_SIZE": ranks_per_node}
    ranks = {"RANK": rank, "WORLD_SIZE": n_ranks, **place}
    network = {"MASTER_ADDR": address(0), "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": 1}
    return {**os.environ, **{name: str(value) for name, value in {**ranks, **network}.items()}}
