"""What ranks have kept for a parameter's weights, found again by whichever ranks keep them now: as a whole, or in parts
of the flattened parameter, in any of a checkpoint's files.
"""

import math
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distillation.exchange import Owned


class BadParts(ValueError):
    """Says what is wrong with the parts of a parameter, in words that follow its name."""


class Part(NamedTuple):
    """Holds where some of a parameter's numbers are. start: of them in the flattened parameter; None for all of it."""

    start: int | None
    shape: tuple[int, ...]
    file: Any  # an open safetensors file
    key: str

    def read(self, begin: int, end: int) -> Tensor:
        """Returns its flattened numbers from `begin` to `end`, and reads no more rows of them than it must."""
        if not self.shape:
            return self.file.get_tensor(self.key).view(-1)
        width = math.prod(self.shape[1:])
        first, last = begin // width, -(-end // width)
        rows = self.file.get_slice(self.key)[first:last].view(-1)
        return rows[begin - first * width : end - first * width]


def parts_by_name(files: dict[str, Any]) -> dict[str, list[Part]]:
    """Returns the parts by `<kind>/<parameter>`. files: open ones by the names of the tensors in them."""
    parts = defaultdict(list)
    for key, file in files.items():
        name, at, start = key.rpartition("@")
        place = Part(int(start) if at else None, tuple(file.get_slice(key).get_shape()), file, key)
        parts[name if at else key].append(place)
    return dict(parts)


def read_parts(parts: list[Part], owned: Owned) -> Tensor:
    """Returns the numbers (size,) of owned weights, put together from all parts. Raises BadParts if some are missing,
    or a whole parameter has another shape.
    """
    found, n_found = torch.empty(owned.size), 0
    for part in parts:
        if part.start is None and part.shape != owned.parameter.shape:
            raise BadParts(f"has shape {part.shape}, expected {tuple(owned.parameter.shape)}")
        start = part.start or 0
        begin, end = max(owned.start, start), min(owned.start + owned.size, start + math.prod(part.shape))
        if begin < end:
            found[begin - owned.start : end - owned.start] = part.read(begin - start, end - start)
            n_found += end - begin
    if n_found != owned.size:
        raise BadParts(f"has {n_found:,} of the {owned.size:,} numbers that are needed; expected all")
    return found
