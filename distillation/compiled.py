"""Functions of tensors that are one kernel on a GPU, made by torch.compile. They are for what has to have the same bits
on every machine: such a kernel is used only if it gives those of the plain function on samples.
"""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("train")

Inputs = tuple[Tensor, ...]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of a number
DEVICES = {"cuda"}  # on a CPU a compiler would have to be there, and the wire decides


class Compiled:
    """Calls a function of tensors, whose result is a tensor or several, without gradients; on a GPU as one kernel."""

    def __init__(
        self, title: str, plain: Callable, samples: Callable[[torch.device, torch.dtype], Iterable[Inputs]]
    ) -> None:
        """title: for a warning. samples: inputs with all cases, for a device and the dtype of the first input; and with
        each dimension that may be 1 once so, for which torch.compile makes another kernel.
        """
        self.title, self.plain, self.samples = title, plain, samples
        self.tried: dict[tuple[torch.device, torch.dtype], str | None] = {}

    @functools.cached_property
    def compiled(self) -> Callable:
        return torch.compile(self.plain, dynamic=True)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        first = inputs[0]
        if first.device.type not in DEVICES or self.why_plain(first.device, first.dtype) is not None:
            return self.plain(*inputs)
        return self._of_kernel(inputs)

    def _of_kernel(self, inputs: Inputs) -> Any:
        # Each as if it were not a part of another tensor: for those torch.compile makes kernels of their own, at their
        # first call, that no sample has tried.
        return self.compiled(*map(torch.from_dlpack, inputs))

    @torch.no_grad()
    def why_plain(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Returns why the kernel cannot take the function's place, None if it does. The first time it is made, and
        tried. dtype: of the first input.
        """
        if (device, dtype) not in self.tried:
            reason = self._why_not(device, dtype)
            if reason is not None:
                logger.warning("%s is not compiled and takes longer: %s", self.title, reason)
            self.tried[device, dtype] = reason
        return self.tried[device, dtype]

    def _why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        try:
            for inputs in self.samples(device, dtype):
                pairs = zip(_as_tuple(self._of_kernel(inputs)), _as_tuple(self.plain(*inputs)), strict=True)
                if not all(have_same_bits(one, other) for one, other in pairs):
                    return "the kernel that torch.compile made gives other bits"
        except torch.OutOfMemoryError:
            raise  # the plain function takes more
        except Exception as error:  # of the compiler or of Triton's launch, whose errors have no common class
            return (str(error).strip() or repr(error)).splitlines()[0]
        return None


def have_same_bits(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors have the same shape, dtype and bits; any NaN equals any other."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.is_floating_point:
        both = one.isnan() & other.isnan()
        one, other = one.masked_fill(both, 0).contiguous(), other.masked_fill(both, 0).contiguous()
        one, other = (m.view(BITS[m.element_size()]) for m in (one, other))
    return torch.equal(one, other)


def _as_tuple(results: Tensor | Inputs) -> Inputs:
    return (results,) if isinstance(results, Tensor) else results
