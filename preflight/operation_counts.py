"""Counts one operation of PyTorch: the multiplications and additions of matrix products and attention, and the bytes
that every other operation reads and writes. A GPU does the former at the rate of its matrix units, and the latter at
the rate of its memory.

Bytes are those of eager code, in which each operation is a pass over memory. Code that is fused moves fewer.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_iter

aten = torch.ops.aten

# Which argument is the left factor of a product (..., n, k) (..., k, m). Each entry of the result takes 2k operations.
LEFT_FACTOR = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.addmm_: 1, aten.baddbmm: 1, aten.baddbmm_: 1}
ATTENTION = (aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_backward)

# Of the first argument, a table, these read or change only as much as they return or are given.
GATHERS = (aten.embedding, aten.index, aten.index_select, aten.gather)
SCATTERS = (aten.scatter_add_, aten.scatter_, aten.index_put_, aten.index_add_)
# These write without reading what they write to.
OVERWRITES = (aten.copy_, aten.fill_, aten.zero_, aten._foreach_copy_, aten._foreach_zero_)
MADE_UNWRITTEN = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)


def count_operations(packet: Any, args: Sequence[Any], result: Any) -> int:
    """Returns the multiplications and additions of matrix products and causal attention; all others are few."""
    if packet in LEFT_FACTOR:
        return 2 * result.numel() * args[LEFT_FACTOR[packet]].shape[-1]
    if packet is aten._scaled_dot_product_flash_attention:  # two products, of which half is masked
        return 2 * args[0].numel() * args[1].shape[-2]
    if packet is aten._scaled_dot_product_flash_attention_backward:  # five of them
        return 5 * args[1].numel() * args[2].shape[-2]
    return 0


def moved_bytes(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Returns the bytes that an operation reads and writes, each tensor once; 0 for what `count_operations` counts, for
    views, and for memory that is only allocated.
    """
    packet = func.overloadpacket
    if packet in LEFT_FACTOR or packet in ATTENTION or packet in MADE_UNWRITTEN or func.is_view:
        return 0
    if packet in GATHERS:
        return _n_bytes([args[1:], kwargs]) + 2 * _n_bytes(result)
    if packet in SCATTERS:
        return _n_bytes([args[1:], kwargs]) + 2 * _n_bytes(args[-1])
    total, changes = 0, False
    for position, argument in enumerate(func._schema.arguments):
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        is_read = not argument.is_out and not (is_written and packet in OVERWRITES)
        total += (is_read + is_written) * _n_bytes(given)
        changes = changes or is_written
    if changes:  # the result is what was changed
        return total
    storages = [tensor.untyped_storage() for tensor in tensors_in([args, kwargs])]
    made = [tensor for tensor in tensors_in(result) if not any(tensor.untyped_storage() is one for one in storages)]
    return total + _n_bytes(made) if made else 0  # else a view by another name


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yields the tensors among arguments or results."""
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def _n_bytes(tree: Any) -> int:
    """Returns the bytes of tensors; of dimensions along which `expand` repeats one place, that place's."""
    total = 0
    for tensor in tensors_in(tree):
        sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        total += math.prod(sizes) * tensor.itemsize
    return total
