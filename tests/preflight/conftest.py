"""Fixtures: GPUs that are not there."""

import pytest
import torch

from preflight.checks import machine


@pytest.fixture
def gpus(monkeypatch):
    """Returns a function that mocks a machine with `n` GPUs of 80 GB."""

    def become(n, free=79e9, capability=(9, 0), problem=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free), int(80e9)))
        monkeypatch.setattr(machine, "kernel_problem", lambda _: problem)

    return become
