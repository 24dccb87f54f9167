"""How gradients travel to their owners: as they are, or as integers of 8 or 4 bits with a scale for each block of them.
Integers are rounded to the nearest and nothing is kept of the errors: a code has no state that a checkpoint would have
to hold, or that would mean nothing to another number of ranks.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class GradientCode(Protocol):
    """Turns gradients into bytes and back."""

    def encode(self, pieces: Tensor) -> Tensor:
        """Returns the bytes (R, m) uint8 of pieces (R, n), one for each rank."""
        ...

    def decode(self, message: Tensor) -> Tensor:
        """Returns the gradients (n,) float32 of a piece's bytes (m,)."""
        ...


@dataclass(frozen=True)
class Exact:
    """Sends gradients in their own dtype."""

    dtype: torch.dtype

    def encode(self, pieces: Tensor) -> Tensor:
        return pieces.to(self.dtype).view(torch.uint8)

    def decode(self, message: Tensor) -> Tensor:
        return message.view(self.dtype).float()


@dataclass(frozen=True)
class BlockIntegers:
    """Sends integers of 8 or 4 bits, and the bfloat16 scale of each block: its largest gradient divided by the largest
    integer. A block with a gradient that is not finite has such a scale, and arrives as numbers that are not finite.
    """

    bits: int

    @property
    def block(self) -> int:
        return {8: 128, 4: 32}[self.bits]

    @property
    def top(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def encode(self, pieces: Tensor) -> Tensor:
        blocks = pieces.float().view(len(pieces), -1, self.block)  # (R, blocks, block)
        scale = (blocks.abs().amax(dim=-1) / self.top).to(torch.bfloat16)  # (R, blocks)
        divisor = scale.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        integers = (blocks / divisor).round_().clamp_(-self.top, self.top).to(torch.int8).view(len(pieces), -1)
        if self.bits == 4:
            low, high = integers.view(torch.uint8).view(len(pieces), -1, 2).unbind(-1)
            integers = (low & 15) | (high << 4)
        return torch.cat([integers.view(torch.uint8), scale.view(torch.uint8)], dim=1)

    def decode(self, message: Tensor) -> Tensor:
        n_blocks = len(message) // (self.block * self.bits // 8 + 2)
        packed, scale = message.split([n_blocks * self.block * self.bits // 8, 2 * n_blocks])
        if self.bits == 4:
            # The shift to the right keeps the sign, so that the lower half is shifted up first.
            packed = torch.stack([(packed << 4).view(torch.int8) >> 4, packed.view(torch.int8) >> 4], dim=-1)
        integers = packed.contiguous().view(torch.int8).view(n_blocks, self.block)
        return (integers * scale.clone().view(torch.bfloat16).float()[:, None]).view(-1)


def gradient_code(bits: int, dtype: torch.dtype) -> GradientCode:
    """Returns the code of 16 bits, which is exact in every dtype, or of 8 or 4."""
    return Exact(dtype) if bits == 16 else BlockIntegers(bits)
