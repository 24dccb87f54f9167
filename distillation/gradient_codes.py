"""How gradients travel to their owners: as they are, or as integers of 8 or 4 bits with a scale for each block of them.
Integers are rounded to the nearest and nothing is kept of the errors: a code has no state that a checkpoint would have
to hold, or that would mean nothing to another number of ranks.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distillation.compiled import Compiled

BLOCK = {8: 128, 4: 32}  # gradients, by bits
TOP = {8: 127, 4: 7}  # the largest integer


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
        return BLOCK[self.bits]

    @property
    def top(self) -> int:
        return TOP[self.bits]

    def encode(self, pieces: Tensor) -> Tensor:
        blocks = pieces.view(len(pieces), -1, self.block)  # (R, blocks, block)
        scale = (_largest(blocks) / self.top).to(torch.bfloat16)  # (R, blocks)
        # Divided here: a compiled division may round otherwise, a product does not.
        inverse = 1 / scale.float().clamp_min(torch.finfo(torch.float32).tiny)
        packed = _rounded[self.bits](blocks, inverse).view(len(pieces), -1)
        return torch.cat([packed, scale.view(torch.uint8)], dim=1)

    def decode(self, message: Tensor) -> Tensor:
        n_blocks = len(message) // (self.block * self.bits // 8 + 2)
        packed, scale = message.split([n_blocks * self.block * self.bits // 8, 2 * n_blocks])
        scale = scale.clone().view(torch.bfloat16).float()  # (blocks,)
        return _widened[self.bits](packed.view(n_blocks, -1), scale).view(-1)


def gradient_code(bits: int, dtype: torch.dtype) -> GradientCode:
    """Returns the code of 16 bits, which is exact in every dtype, or of 8 or 4."""
    return Exact(dtype) if bits == 16 else BlockIntegers(bits)


def kernels_of(gradient_bits: int, dtype: torch.dtype) -> list[tuple[Compiled, torch.dtype]]:
    """Returns what is compiled for gradients of a dtype that travel in so many bits, with the dtype that it reads."""
    if gradient_bits == 16:
        return []
    return [(_largest, dtype), (_rounded[gradient_bits], dtype), (_widened[gradient_bits], torch.uint8)]


# --- what each block takes part in alone: blocks (R, n, block), scales (R, n) --------------------------------


def _plain_largest(blocks: Tensor) -> Tensor:
    return blocks.float().abs().amax(dim=-1)


def _plain_rounded_8(blocks: Tensor, inverse: Tensor) -> Tensor:
    """Returns a byte for each gradient: (R, n, block) uint8."""
    return _integers(blocks, inverse, TOP[8]).view(torch.uint8)


def _plain_rounded_4(blocks: Tensor, inverse: Tensor) -> Tensor:
    """Returns a byte for each two gradients: (R, n, block / 2) uint8."""
    low, high = _integers(blocks, inverse, TOP[4]).view(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return (low & 15) | (high << 4)


def _integers(blocks: Tensor, inverse: Tensor, top: int) -> Tensor:
    return (blocks.float() * inverse[..., None]).round().clamp(-top, top).to(torch.int8)


def _plain_widened_8(packed: Tensor, scale: Tensor) -> Tensor:
    """Returns gradients (n, block) of packed integers (n, block) uint8 and scales (n,)."""
    return packed.view(torch.int8) * scale[:, None]


def _plain_widened_4(packed: Tensor, scale: Tensor) -> Tensor:
    """Returns gradients (n, block) of packed integers (n, block / 2) uint8 and scales (n,)."""
    # The shift to the right keeps the sign, so that the lower half is shifted up first.
    integers = torch.stack([(packed << 4).view(torch.int8) >> 4, packed.view(torch.int8) >> 4], dim=-1)
    return integers.flatten(1) * scale[:, None]


def _draw(device: torch.device, dtype: torch.dtype, block: int) -> Tensor:
    """Returns blocks (2, 34, block) of sizes from the smallest numbers to large ones, of ties between two integers, and
    of zeros.
    """
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(2, 34, block, generator=generator) * torch.logspace(-42, 3, 34)[:, None]
    blocks[0, 0], blocks[1, 0] = 0, -0.0
    blocks[:, 1] = torch.arange(block).remainder(13) - 6.5
    blocks[:, 1, 0] = TOP[8] if block == BLOCK[8] else TOP[4]  # so that the scale is 1
    return blocks.to(device, dtype)


def _blocks(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor]]:
    for block in BLOCK.values():
        blocks = _draw(device, dtype, block)
        yield (blocks,)
        blocks[0, 2, 3], blocks[1, 3, 5], blocks[1, 4, 7] = torch.nan, torch.inf, -torch.inf
        yield (blocks,)
        yield (blocks[:, 1:2].contiguous(),)


def _blocks_with_inverse(bits: int, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    blocks = _draw(device, dtype, BLOCK[bits])
    scale = (_plain_largest(blocks) / TOP[bits]).to(torch.bfloat16).float()
    inverse = 1 / scale.clamp_min(torch.finfo(torch.float32).tiny)
    yield blocks, inverse
    yield blocks[:, 1:2].contiguous(), inverse[:, 1:2].contiguous()


def _bytes(bits: int, device: torch.device, _dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields every byte beside every other one, and scales, some of them not finite."""
    packed = torch.arange(2**8, dtype=torch.uint8, device=device).repeat(BLOCK[bits]).view(-1, BLOCK[bits] * bits // 8)
    scale = torch.logspace(-40, 30, len(packed), device=device).to(torch.bfloat16).float()
    scale[1], scale[2], scale[3] = torch.nan, torch.inf, 0
    yield packed, scale
    yield packed[4:5], scale[4:5]


_largest = Compiled("the scale of gradients", _plain_largest, _blocks)
_rounded = {
    bits: Compiled(f"rounding gradients to {bits} bits", plain, functools.partial(_blocks_with_inverse, bits))
    for bits, plain in ((8, _plain_rounded_8), (4, _plain_rounded_4))
}
_widened = {
    bits: Compiled(f"reading gradients of {bits} bits", plain, functools.partial(_bytes, bits))
    for bits, plain in ((8, _plain_widened_8), (4, _plain_widened_4))
}
