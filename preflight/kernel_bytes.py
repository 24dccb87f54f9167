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
# Bytes of each number, forward and backward, in the fused form by those in the plain one (docs/performance.md).
OF_PLAIN_FORM = {"rms_norm": 14 / 132, "swiglu": 16 / 28, "gate": 30 / 56}


@contextmanager
def counted_as_on_gpus(memory: LiveMemory, dtype: torch.dtype) -> Iterator[None]:
    """Weighs the bytes of scans, norms, SwiGLUs and gates in the block, and of their backward passes there."""
    plain = kernels_for("meta", dtype)
    functions: dict[str, Any] = {
        name: weighed(memory, getattr(plain.elementwise, name), part) for name, part in OF_PLAIN_FORM.items()
    }
    as_on_gpus = plain._replace(
        scan=weighed(memory, plain.scan, OF_PLAIN_SCAN), elementwise=plain.elementwise._replace(**functions)
    )
    with using_kernels(as_on_gpus, "meta", dtype):
        yield


def weighed(memory: LiveMemory, function: Callable[..., Any], weight: float) -> Callable[..., Any]:
    """Returns the function, during which, and during whose backward pass, bytes count as `weight` of them. Of several
    results the first alone is differentiated.
    """

    def run(*inputs, **more) -> Any:
        learn = [i for i, given in enumerate(inputs) if isinstance(given, Tensor) and given.requires_grad]
        given = list(inputs)
        if learn and torch.is_grad_enabled():
            for i, marked in zip(learn, _Mark.apply(memory, 1.0, *(inputs[i] for i in learn)), strict=True):
                given[i] = marked
        before, memory.weight = memory.weight, weight
        result = function(*given, **more)
        memory.weight = before
        first, *rest = result if isinstance(result, tuple) else (result,)
        if first.requires_grad:
            (first,) = _Mark.apply(memory, weight, first)
        return (first, *rest) if rest else first

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
