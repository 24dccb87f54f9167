"""Copies tensors to the host for a checkpoint. Their place there is pageable memory: torch rounds pinned memory up to
powers of two and never returns it. From a GPU a copy to pageable memory is slow, so two small pinned buffers are filled
and emptied in turn.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

STAGE_BYTES = 64 * 2**20  # of each buffer; a power of two, as torch would make it


def copy_to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies in pageable memory; those of a GPU's tensors are made on a stream of their own, after the work
    that this thread's current stream has been given so far. When it returns, all are complete.
    """
    copies = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    for device in {tensor.device for tensor in tensors.values()}:
        pairs = [(tensor.detach(), copies[name]) for name, tensor in tensors.items() if tensor.device == device]
        if device.type == "cuda":
            with _side_stream(device):
                _copy_staged(pairs, [Stage(STAGE_BYTES), Stage(STAGE_BYTES)])
        else:
            for source, target in pairs:
                target.copy_(source)
    return copies


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Gives the block a stream of its own on `device`, which begins after what the current one has been given."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield


class Stage:
    """Holds a pinned buffer, and where on the host its content belongs."""

    def __init__(self, n_bytes: int) -> None:
        self.buffer = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        self.filled = torch.cuda.Event()
        self.target: Tensor | None = None

    def fill(self, source: Tensor, target: Tensor) -> None:
        """Starts the copy of bytes `source` (n,) on the device, which belong to `target` (n,) on the host."""
        self.empty()
        self.buffer[: len(source)].copy_(source, non_blocking=True)
        self.filled.record()
        self.target = target

    def empty(self) -> None:
        """Waits for the copy that was started, and copies the bytes to where they belong."""
        if self.target is not None:
            self.filled.synchronize()
            self.target.copy_(self.buffer[: len(self.target)])
            self.target = None


def _copy_staged(pairs: Iterable[tuple[Tensor, Tensor]], stages: list[Stage]) -> None:
    """Copies each source to its target, both of the same shape and dtype. While one stage is emptied by the processor,
    the next is filled by the device.
    """
    turns = itertools.cycle(stages)
    size = len(stages[0].buffer)
    for source, target in pairs:
        for part, place in zip(_bytes(source).split(size), _bytes(target).split(size), strict=True):
            next(turns).fill(part, place)
    for stage in stages:
        stage.empty()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
