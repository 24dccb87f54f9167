"""Flat buckets of parameters, of which each rank owns an equal piece: the parameters' weights and gradients are views
of two tensors of a bucket, so that a piece is sent as it lies there.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from distillation.exchange import Owned

# Parameters begin, and pieces end, at multiples of this. AdamW's kernel takes what is left over after whole vectors by
# other instructions, with other last bits, and gradients of few bits have a scale for each such block: neither must
# depend on what else is in a bucket.
WHOLE = 128


class Bucket:
    """Holds some parameters of one dtype and one group of the optimizer.

    weights, grads: (n,), n padded to a multiple of the ranks; those of the parameters one after another.
    own: this rank's piece of the weights, (n / R,).
    master: the optimizer's parameter, (n / R,) float32: `own` itself if that is float32.
    """

    def __init__(self, parameters: list[nn.Parameter], row: int = 1) -> None:
        """row: numbers that belong together, and that no two ranks share, such as a row of the embedding."""
        self.parameters, self.row = parameters, row
        n_ranks, first = dist.get_world_size(), parameters[0]
        *_, (last, start) = self.starts()
        n = _up_to(n_ranks * row * WHOLE, start + last.numel())
        self.weights = first.new_zeros(n)
        self.grads = first.new_zeros(n)
        for parameter, start in self.starts():
            part = slice(start, start + parameter.numel())
            self.weights[part] = parameter.detach().view(-1)
            parameter.data = self.weights[part].view_as(parameter)
            parameter.grad = self.grads[part].view_as(parameter)
        self.own = self.weights.chunk(n_ranks)[dist.get_rank()]
        self.master = nn.Parameter(self.own if self.own.dtype == torch.float32 else self.own.float())

    def starts(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Yields the parameters, and where each begins."""
        start = 0
        for parameter in self.parameters:
            yield parameter, start
            start += _up_to(WHOLE, parameter.numel())

    def owned(self) -> Iterator[tuple[Owned, slice]]:
        """Yields which weights of its parameters are in this rank's piece, and where in it."""
        size = len(self.own)
        low = dist.get_rank() * size
        for parameter, at in self.starts():
            begin, end = max(at, low), min(at + parameter.numel(), low + size)
            if begin < end:
                yield Owned(parameter, begin - at, end - begin), slice(begin - low, end - low)


def _up_to(unit: int, n: int) -> int:
    """Returns the next multiple of the unit."""
    return -(-n // unit) * unit
