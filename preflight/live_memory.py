"""Adds up the storages that are alive while code runs, and the operations of its matrix products and attention. On the
meta device this measures code that would need many GPUs.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

aten = torch.ops.aten
Items = dict[str, int]  # bytes or operations, by purpose

# Which argument is the left factor of a product (..., n, k) (..., k, m). Each entry of the result takes 2k operations.
LEFT_FACTOR = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.addmm_: 1, aten.baddbmm: 1, aten.baddbmm_: 1}


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of every storage that is made within it, until the storage is freed, and operations. Both count
    under the item that `enter` named last. `at_peak` holds the items' bytes when their sum was largest.

    given: tensors that existed before; they do not count.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.given = [tensor.untyped_storage() for tensor in given]  # held, so that no other storage gets their ids
        self.known = {id(storage) for storage in self.given}
        self.item = ""
        self.live: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.restart_peak()

    def enter(self, item: str) -> None:
        self.item = item

    @property
    def total(self) -> int:
        return self.live.total()

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())

    def restart_peak(self) -> None:
        self.at_peak: Items = dict(self.live)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations[self.item] += count_operations(func.overloadpacket, args, result)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self.known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self.known.add(id(storage))
        self.live[self.item] += storage.nbytes()
        weakref.finalize(storage, self._free, id(storage), self.item, storage.nbytes())
        if self.total > self.peak:
            self.restart_peak()

    def _free(self, key: int, item: str, size: int) -> None:
        self.known.discard(key)
        self.live[item] -= size


def count_operations(packet: Any, args: Sequence[Any], result: Any) -> int:
    """Returns the multiplications and additions of matrix products and causal attention; all others are few."""
    if packet in LEFT_FACTOR:
        return 2 * result.numel() * args[LEFT_FACTOR[packet]].shape[-1]
    if packet is aten._scaled_dot_product_flash_attention:  # two products, of which half is masked
        return 2 * args[0].numel() * args[1].shape[-2]
    if packet is aten._scaled_dot_product_flash_attention_backward:  # five of them
        return 5 * args[1].numel() * args[2].shape[-2]
    return 0
