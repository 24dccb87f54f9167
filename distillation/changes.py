"""A code for what has changed in 16-bit weights: 2 bits for each, in place of 16. Most weights stay or move by one step
of their dtype (an ulp) in an update; the new bits of those that move further follow. The code is exact for every pair
of bits, NaN and -0.0 included. Nothing here waits for the device.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from distillation.compiled import Compiled

# By code: what is added to a weight's bits, read as an integer. LONGER: its new bits follow the codes.
SAME, UP, LONGER, DOWN = 0, 1, 2, 3
PER_BYTE = 4
SHIFTS = (0, 2, 4, 6)
MOVES = (0, 1, -1, 2, -2, -(2**15), 77, 3)


def most_longer(n: int) -> int:
    """Returns how many of n weights may have moved further before the code is longer than the weights themselves."""
    return n - n // (2 * PER_BYTE)


def count_longer(old: Tensor, new: Tensor) -> Tensor:
    """Returns how many weights moved by more than one ulp, a scalar. old, new: (n,) of 16 bits each."""
    return _count(old.view(torch.int16), new.view(torch.int16))


def encode_changes(old: Tensor, new: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Returns codes (n / 4,) uint8 of the changes from old to new, (n,) of 16 bits each with n a multiple of 4; and the
    bits (room,) int16 of the new weights that moved further. room: at least as many as those are.
    """
    bits = new.view(torch.int16)
    codes, is_longer = _codes(old.view(torch.int16), bits)
    longer = bits.new_zeros(room + 1)  # the last place takes what all others leave there
    longer.scatter_(0, torch.where(is_longer, is_longer.cumsum(0, dtype=torch.int32) - 1, room).long(), bits)
    return codes, longer[:room]


def apply_changes(weights: Tensor, codes: Tensor, longer: Tensor) -> None:
    """Turns old weights (n,) into new ones, in place. codes (n / 4,), longer (m or more,): from `encode_changes`."""
    bits = weights.view(torch.int16)
    stepped, is_longer = _stepped(bits, codes)
    if not len(longer):
        bits.copy_(stepped)
        return
    place = (is_longer.cumsum(0, dtype=torch.int32) - 1).clamp_(0, len(longer) - 1)
    torch.where(is_longer, longer[place], stepped, out=bits)


# --- what each weight takes part in alone: int16 bits (n,) and uint8 codes (n / 4,) --------------------------


def _plain_count(old: Tensor, new: Tensor) -> Tensor:
    return _is_longer(new - old).sum()


def _plain_codes(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the codes, and which weights moved further (n,)."""
    moved = new - old  # (n,), modulo 2^16
    is_longer = _is_longer(moved)
    codes = torch.where(is_longer, LONGER, moved & 3).to(torch.uint8).view(-1, PER_BYTE)  # -1 & 3 is DOWN
    return codes[:, 0] | (codes[:, 1] << 2) | (codes[:, 2] << 4) | (codes[:, 3] << 6), is_longer


def _plain_stepped(bits: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the bits of the weights that moved by one step or not at all, and which moved further, (n,) each."""
    unpacked = torch.stack([(codes >> shift) & 3 for shift in SHIFTS], dim=1).view(-1)  # (n,)
    step = (unpacked == UP).to(torch.int16) - (unpacked == DOWN).to(torch.int16)
    return bits + step, unpacked == LONGER


def _is_longer(moved: Tensor) -> Tensor:
    # The absolute value would not do: that of -2^15, from w to -w, is negative.
    return (moved != 0) & (moved != 1) & (moved != -1)


def _pairs(device: torch.device, _dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields every 16 bits, and what they may become."""
    every = torch.arange(-(2**15), 2**15, device=device).to(torch.int16)
    for shift in range(len(MOVES)):
        moves = torch.tensor(MOVES, dtype=torch.int16, device=device).roll(shift).repeat(2**16 // len(MOVES))
        yield every, every + moves


def _coded(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    for old, new in _pairs(device, dtype):
        yield old, _plain_codes(old, new)[0]


_count = Compiled("counting what changed in the weights", _plain_count, _pairs)
_codes = Compiled("coding what changed in the weights", _plain_codes, _pairs)
_stepped = Compiled("applying what changed in the weights", _plain_stepped, _coded)
KERNELS = [(function, torch.int16) for function in (_count, _codes, _stepped)]  # with the dtype that each reads
