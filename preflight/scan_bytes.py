"""Counts the bytes that a scan moves as those of the kernels that run on GPUs. The meta device computes the plain form,
which moves four times as many.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from llamba.kernels import kernels_for, using_kernels
from preflight.live_memory import LiveMemory

# A mixer of 8B, 2 x 1024 tokens, forward and backward: what mamba-ssm's kernels are given and return, by their order in
# llamba/mamba_scan.py, is 0.20 + 0.67 GB; the plain form and its recomputation move 3.7 GB.
OF_PLAIN_SCAN = 0.25


@contextmanager
def scans_by_kernels(memory: LiveMemory, dtype: torch.dtype) -> Iterator[None]:
    """Weighs the bytes of scans in the block, and of their backward passes there."""
    plain = kernels_for("meta", dtype)

    def scan(*inputs, **states) -> tuple[Tensor, Tensor]:
        before, memory.weight = memory.weight, OF_PLAIN_SCAN
        y, state = plain.scan(*inputs, **states)
        memory.weight = before
        if y.requires_grad:  # backward begins at y, and ends at the first input whose gradient is complete
            y.register_hook(lambda _: setattr(memory, "weight", OF_PLAIN_SCAN))
            for given in inputs:
                if isinstance(given, Tensor) and given.requires_grad:
                    given.register_hook(lambda _: setattr(memory, "weight", 1.0))
        return y, state

    with using_kernels(plain._replace(scan=scan), "meta", dtype):
        yield
