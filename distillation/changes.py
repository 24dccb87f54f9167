"""A code for what has changed in 16-bit weights: 2 bits for each, in place of 16. Most weights stay or move by one step
of their dtype (an ulp) in an update; the new bits of those that move further follow. The code is exact for every pair
of bits, NaN and -0.0 included. Nothing here waits for the device.
"""

import torch
from torch import Tensor

# By code: what is added to a weight's bits, read as an integer. LONGER: its new bits follow the codes.
SAME, UP, LONGER, DOWN = 0, 1, 2, 3
PER_BYTE = 4
SHIFTS = (0, 2, 4, 6)


def most_longer(n: int) -> int:
    """Returns how many of n weights may have moved further before the code is longer than the weights themselves."""
    return n - n // (2 * PER_BYTE)


def count_longer(old: Tensor, new: Tensor) -> Tensor:
    """Returns how many weights moved by more than one ulp, a scalar. old, new: (n,) of 16 bits each."""
    return _is_longer(new.view(torch.int16) - old.view(torch.int16)).sum()


def encode_changes(old: Tensor, new: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """Returns codes (n / 4,) uint8 of the changes from old to new, (n,) of 16 bits each with n a multiple of 4; and the
    bits (room,) int16 of the new weights that moved further. room: at least as many as those are.
    """
    bits = new.view(torch.int16)
    moved = bits - old.view(torch.int16)  # (n,), modulo 2^16
    is_longer = _is_longer(moved)
    codes = torch.where(is_longer, LONGER, moved & 3).to(torch.uint8).view(-1, PER_BYTE)  # -1 & 3 is DOWN
    packed = codes[:, 0] | (codes[:, 1] << 2) | (codes[:, 2] << 4) | (codes[:, 3] << 6)
    longer = bits.new_zeros(room + 1)  # the last place takes what all others leave there
    longer.scatter_(0, torch.where(is_longer, is_longer.cumsum(0, dtype=torch.int32) - 1, room).long(), bits)
    return packed, longer[:room]


def _is_longer(moved: Tensor) -> Tensor:
    # The absolute value would not do: that of -2^15, from w to -w, is negative.
    return (moved != 0) & (moved != 1) & (moved != -1)


def apply_changes(weights: Tensor, codes: Tensor, longer: Tensor) -> None:
    """Turns old weights (n,) into new ones, in place. codes (n / 4,), longer (m or more,): from `encode_changes`."""
    bits = weights.view(torch.int16)
    unpacked = torch.stack([(codes >> shift) & 3 for shift in SHIFTS], dim=1).view(-1)  # (n,)
    bits += (unpacked == UP).to(torch.int16) - (unpacked == DOWN).to(torch.int16)
    if len(longer):
        is_longer = unpacked == LONGER
        place = (is_longer.cumsum(0, dtype=torch.int32) - 1).clamp_(0, len(longer) - 1)
        torch.where(is_longer, longer[place], bits, out=bits)
