"""Flat buckets of parameters, of which each rank owns an equal piece: the parameters' weights and gradients are views
of two tensors of a bucket, so that a piece is sent as it lies there.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from distillation.exchange import Owned

# A piece is a multiple of this. AdamW's kernel takes what is left over after whole vectors by other instructions, with
# other last bits: these must not depend on where a piece ends.
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
        unit = n_ranks * row * WHOLE
        n = -(-sum(parameter.numel() for parameter in parameters) // unit) * unit
        self.weights = first.new_zeros(n)
        self.grads = first.new_zeros(n)
        for parameter, start in zip(parameters, self.starts(), strict=True):
            part = slice(start, start + parameter.numel())
            self.weights[part] = parameter.detach().view(-1)
            parameter.data = self.weights[part].view_as(parameter)
            parameter.grad = self.grads[part].view_as(parameter)
        self.own = self.weights.chunk(n_ranks)[dist.get_rank()]
        self.master = nn.Parameter(self.own if self.own.dtype == torch.float32 else self.own.float())

    def starts(self) -> Iterator[int]:
        """Yields where each parameter begins."""
        start = 0
        for parameter in self.parameters:
            yield start
            start += parameter.numel()

    def owned(self) -> Iterator[tuple[Owned, slice]]:
        """Yields which weights of its parameters are in this rank's piece, and where in it."""
        size = len(self.own)
        low = dist.get_rank() * size
        for parameter, at in zip(self.parameters, self.starts(), strict=True):
            begin, end = max(at, low), min(at + parameter.numel(), low + size)
            if begin < end:
                yield Owned(parameter, begin - at, end - begin), slice(begin - low, end - low)
