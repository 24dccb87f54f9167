"""Counts the bytes that mixers move by their kernels as GPUs have them. The meta device computes the plain forms, which
move several times as many.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from llamba.kernels import kernels_for, using_kernels
from preflight.live_memory import LiveMemory

# A mixer of 8B, 2 x 1024 tokens, forward and backward: what mamba-ssm's kernels are given and return, by their order in
# llamba/mamba_scan.py, is 0.20 + 0.67 GB; the plain form and its recomputation move 3.7 GB.
OF_PLAIN_SCAN = 0.25


@contextmanager
def counted_as_on_gpus(memory: LiveMemory, dtype: torch.dtype) -> Iterator[None]:
    """Weighs the bytes of scans in the block, and of their backward passes there."""
    plain = kernels_for("meta", dtype)
    with using_kernels(plain._replace(scan=weighed(memory, plain.scan, OF_PLAIN_SCAN)), "meta", dtype):
        yield


def weighed(memory: LiveMemory, function: Callable[..., tuple], weight: float) -> Callable[..., tuple]:
    """Returns the function, during which, and during whose backward pass, bytes count as `weight` of them. Its first
    result alone is differentiated.
    """

    def run(*inputs, **more) -> tuple:
        positions = [i for i, given in enumerate(inputs) if isinstance(given, Tensor) and given.requires_grad]
        given = list(inputs)
        if positions and torch.is_grad_enabled():
            marked = _Mark.apply(memory, 1.0, *(inputs[i] for i in positions))
            for i, tensor in zip(positions, marked, strict=True):
                given[i] = tensor
        before, memory.weight = memory.weight, weight
        first, *rest = function(*given, **more)
        memory.weight = before
        if first.requires_grad:
            (first,) = _Mark.apply(memory, weight, first)
        return first, *rest

    return run


class _Mark(torch.autograd.Function):
    """Passes tensors on; when all their gradients are there, bytes count as `weight` of them from then on."""

    @staticmethod
    def forward(ctx: Any, memory: LiveMemory, weight: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.memory, ctx.weight = memory, weight
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.memory.weight = ctx.weight
        return None, None, *gradients
