"""Helpers of the tests of `make gpu-check`: machines that are not there, and sessions on them."""

import time

from preflight.gpu_check.facts import Facts
from preflight.gpu_check.results import Session


def facts(n_gpus=0, **changes):
    values = dict(
        date="2026-12-01",
        commit="abc1234",
        python="3.12.3",
        torch="2.11.0+cu130",
        cuda="13.0",
        triton="3.6.0",
        nccl="2.28.9",
        driver="580.159",
        scan="plain PyTorch",
        convolution="plain PyTorch",
        compiler="/usr/bin/gcc",
        gpus=["NVIDIA H200"] * n_gpus,
        uuids=[f"uuid-{index}" for index in range(n_gpus)],
        gigabytes=[143.8] * n_gpus,
        capability="9.0",
        direct_pairs=0,
        settings={"NCCL_DEBUG": "INFO"},
    )
    return Facts(**{**values, **changes})


def session(work, n_gpus=0, seconds=600.0, **changes):
    return Session(facts(n_gpus, **changes), work, time.monotonic() + seconds)
