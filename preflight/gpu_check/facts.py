"""Finds out what machine this is. Run as a process it prints that as JSON: the first process of `make gpu-check` must
not touch the GPUs, whose memory and contexts are what is checked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

FACTS = "facts of this machine: "  # before the JSON
SETTINGS = re.compile("(NCCL|CUDA|TORCH|PYTORCH|TRITON|MAMBA|OMP|GLOO)_")


@dataclasses.dataclass(frozen=True)
class Facts:
    """Holds versions, the GPUs by index, and what llamba.kernels chooses in bfloat16. settings: environment variables
    of CUDA, NCCL, torch and Triton. direct_pairs: of GPUs that can copy to each other.
    """

    date: str
    commit: str
    python: str
    torch: str
    cuda: str
    triton: str
    nccl: str
    driver: str
    scan: str
    convolution: str
    compiler: str
    gpus: list[str]
    uuids: list[str]
    gigabytes: list[float]
    capability: str
    direct_pairs: int
    settings: dict[str, str]

    @property
    def machine(self) -> str:
        """Returns one line: the GPUs and all versions that a figure depends on."""
        versions = f"torch {self.torch}, Triton {self.triton}, Python {self.python}"
        if not self.gpus:
            return f"no GPU ({platform.machine()}, {os.cpu_count()} cores), {versions}"
        n = f"{len(self.gpus)} x " if len(self.gpus) > 1 else ""
        return f"{n}{self.gpus[0]}, driver {self.driver}, CUDA {self.cuda}, {versions}"


def gather() -> Facts:
    """Finds the facts. Makes a CUDA context on each GPU."""
    import torch

    from llamba.kernels import kernels_for
    from preflight.checks.basics import installed_version

    n_gpus = torch.cuda.device_count()
    gpus = [torch.cuda.get_device_properties(index) for index in range(n_gpus)]
    kernels = kernels_for("cuda" if gpus else "cpu", torch.bfloat16)
    pairs = [(one, other) for one in range(n_gpus) for other in range(n_gpus) if one != other]
    return Facts(
        date=time.strftime("%Y-%m-%d"),
        commit=output_of("git", "describe", "--always", "--dirty") or "unknown",
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda or "none",
        triton=installed_version("triton") or "none",
        nccl=".".join(map(str, torch.cuda.nccl.version())) if gpus else "none",
        driver=driver_version(),
        scan=kernels.scan_name,
        convolution=kernels.conv_name,
        compiler=next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), "none"),
        gpus=[gpu.name for gpu in gpus],
        uuids=[str(gpu.uuid).removeprefix("GPU-") for gpu in gpus],
        gigabytes=[round(gpu.total_memory / 1e9, 1) for gpu in gpus],
        capability=f"{gpus[0].major}.{gpus[0].minor}" if gpus else "none",
        direct_pairs=sum(torch.cuda.can_device_access_peer(*pair) for pair in pairs),
        settings={name: value for name, value in sorted(os.environ.items()) if SETTINGS.match(name)},
    )


def driver_version() -> str:
    """Returns the version of NVIDIA's driver, as far as nvidia-smi knows it."""
    answer = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split()
    return answer[0] if answer else "unknown"


def output_of(*command: str) -> str:
    """Returns what a program prints, without white space around it; nothing if it fails."""
    try:
        place = Path(__file__).parent
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def read_facts(log: Path) -> Facts | None:
    """Returns the facts that a process has printed to its log, or None."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(FACTS)]
    return Facts(**json.loads(lines[-1].removeprefix(FACTS))) if lines else None


if __name__ == "__main__":
    print(FACTS + json.dumps(dataclasses.asdict(gather())), flush=True)
