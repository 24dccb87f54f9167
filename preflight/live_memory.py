"""Adds up the storages that are alive while code runs, the operations of its matrix products and attention, and the
bytes that everything else moves. On the meta device this measures code that would need many GPUs.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from preflight.operation_counts import count_operations, moved_bytes, tensors_in

Items = dict[str, int]  # bytes or operations, by purpose
BACKWARD = "backward's own"  # the purpose of what a backward pass does and makes


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of every storage that is made within it, until the storage is freed, and what `operation_counts`
    counts. All of it counts under the item that `enter` named last. `at_peak` holds the items' bytes when their sum was
    largest.

    given: tensors that existed before; they do not count. weight: of bytes moved, where the code that runs in the end
    moves fewer or more than what is traced.
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.given = [tensor.untyped_storage() for tensor in given]  # held, so that no other storage gets their ids
        self.known = {id(storage) for storage in self.given}
        self.item, self.weight = "", 1.0
        self.live: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
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

    def __torch_dispatch__(self, func: OpOverload, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations[self.item] += count_operations(func.overloadpacket, args, result)
        self.moved[self.item] += int(self.weight * moved_bytes(func, args, kwargs or {}, result))
        for tensor in tensors_in(result):
            if id(tensor.untyped_storage()) not in self.known:
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
