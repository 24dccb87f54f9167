"""Copies of tensors for a checkpoint, and the pinned buffers through which a GPU's come, played on a CPU."""

import contextlib

import pytest
import torch

from checkpointing import host_copy
from checkpointing.host_copy import copy_to_host

TENSORS = {
    "weights": torch.arange(37, dtype=torch.float32).reshape(1, 37),
    "half": torch.arange(50).reshape(5, 10).to(torch.bfloat16),
    "turned": torch.arange(12.0).reshape(3, 4).T,
    "step": torch.tensor(7.0),
    "random state": torch.arange(20, dtype=torch.uint8),
    "nothing": torch.empty(0),
}


def assert_copied(copies):
    assert copies.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        copy = copies[name]
        assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype and copy.is_contiguous(), name
        assert tensor.numel() == 0 or copy.data_ptr() != tensor.data_ptr(), name


def test_copies_are_whole_and_their_own():
    assert_copied(copy_to_host(TENSORS))


class PlayedStage(host_copy.Stage):
    """Is filled only when it is waited for, as by a GPU that is late: what reads it before gets zeros."""

    log: list[str] = []

    def __init__(self, n_bytes):
        self.buffer, self.target, self.filled = torch.zeros(n_bytes, dtype=torch.uint8), None, self
        self.asked = None

    def fill(self, source, target):
        self.empty()
        assert len(source) <= len(self.buffer)
        self.asked, self.target = source, target
        self.log.append("fill")

    def synchronize(self):
        self.buffer[: len(self.asked)] = self.asked
        self.log.append("empty")


@pytest.mark.parametrize("n_bytes", [1, 16, 4096])
def test_two_stages_take_turns(n_bytes):
    """While one is emptied the other is being filled, whatever their size; the last ones are emptied too."""
    PlayedStage.log.clear()
    copies = {name: torch.full(tensor.shape, 9).to(tensor.dtype) for name, tensor in TENSORS.items()}
    pairs = [(tensor, copies[name]) for name, tensor in TENSORS.items()]
    host_copy._copy_staged(pairs, [PlayedStage(n_bytes), PlayedStage(n_bytes)])
    assert_copied(copies)
    log = PlayedStage.log
    assert log[:2] == ["fill", "fill"] and log.count("fill") == log.count("empty") and log[-2:] == ["empty", "empty"]
    assert log[2:-2] == ["empty", "fill"] * (len(log) // 2 - 2)


def test_tensors_of_a_gpu_are_staged_on_a_stream_of_their_own(monkeypatch):
    class OnGpu(torch.Tensor):
        device = torch.device("cuda:1")

    events = []

    @contextlib.contextmanager
    def side_stream(device):
        events.append(f"stream of {device}")
        yield
        events.append("left")

    class Logged(PlayedStage):
        def fill(self, source, target):
            events.append("fill")
            super().fill(source, target)

    monkeypatch.setattr(host_copy, "_side_stream", side_stream)
    monkeypatch.setattr(host_copy, "Stage", Logged)
    given = torch.arange(6.0)
    copies = copy_to_host({"gpu": given.as_subclass(OnGpu), "cpu": given})
    assert torch.equal(copies["gpu"], given) and torch.equal(copies["cpu"], given)
    assert events == ["stream of cuda:1", "fill", "left"]
