"""What a mixer gives causal-conv1d: the output of its projection as it lies in memory, where the kernel takes that. The
kernel is played by the plain convolution with the checks of causal-conv1d's C++.
"""

import functools

import pytest
import torch

from llamba import LlambaConfig
from llamba.kernels import Kernels, causal_conv, causal_conv1d_conv, plain_scan
from llamba.mixer import DiscreteMamba2


class PlayedConv:
    """Checks layouts as csrc/causal_conv1d.cpp does, records them, and returns y in the layout of x."""

    def __init__(self):
        self.storages, self.strides, self.gradients = [], [], []

    def __call__(self, x, weight, bias, activation):
        assert x.stride(2) == 1 or x.stride(1) == 1
        if x.stride(1) == 1 and x.stride(2) > 1:
            assert x.shape[1] % 8 == 0 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0
            assert x.data_ptr() % (8 * x.element_size()) == 0
        self.storages.append(x.untyped_storage().data_ptr())
        self.strides.append(x.stride())
        y = torch.empty_like(x).copy_(causal_conv(x, weight, bias, activation or "identity", None))
        if y.requires_grad:
            y.register_hook(lambda gradient: self.gradients.append(gradient.stride()))
        return y


@pytest.fixture
def mixer(monkeypatch):
    """Returns a function that makes a mixer of some width, with the played kernel, and what it recorded; `scanned` is
    filled with the last strides of x, B and C.
    """

    def make(d_state):
        conv, scanned = PlayedConv(), []

        def scan(x, log_decay, B_, C, *rest, **states):
            scanned.extend(m.stride(-1) for m in (x, B_, C))
            return plain_scan(x, log_decay, B_, C, *rest, **states)

        kernels = Kernels("plain", scan, "causal-conv1d", functools.partial(causal_conv1d_conv, conv))
        monkeypatch.setattr("llamba.mixer.kernels_for", lambda *_: kernels)
        torch.manual_seed(0)
        ssm = {"d_state": d_state, "n_v_heads": 8, "n_qk_heads": 2, "chunk_size": 8}
        return DiscreteMamba2(LlambaConfig(d_model=32, ssm_cfg=ssm)), conv, scanned

    return make


@pytest.mark.parametrize("d_state,as_it_is", [(8, True), (7, False)])
def test_the_projection_goes_to_the_kernel_as_it_lies(mixer, monkeypatch, d_state, as_it_is):
    made, conv, scanned = mixer(d_state)
    projections = []
    made.in_proj.register_forward_hook(lambda _module, _args, out: projections.append(out.untyped_storage().data_ptr()))
    u = torch.randn(2, 13, 32, requires_grad=True)
    y = made(u)
    gradients = torch.autograd.grad(y.square().sum(), [u, *made.parameters()])
    assert (conv.storages == projections) is as_it_is
    if as_it_is:
        assert [stride[1] for stride in (*conv.strides, *conv.gradients)] == [1, 1]
        assert all(stride[0] % 8 == stride[2] % 8 == 0 for stride in conv.gradients)
        assert scanned == [1, 1, 1]  # or the scan's kernels would copy B and C

    plain = Kernels("plain", plain_scan, "plain", causal_conv)
    monkeypatch.setattr("llamba.mixer.kernels_for", lambda *_: plain)
    expected = made(u)
    torch.testing.assert_close(y, expected)
    for one, other in zip(
        gradients, torch.autograd.grad(expected.square().sum(), [u, *made.parameters()]), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_view_that_begins_between_vectors_is_copied():
    conv = PlayedConv()
    xBC = torch.randn(2, 5, 24)[..., 4:20].transpose(1, 2)  # (B, 16, L), four channels after a multiple of eight
    y = causal_conv1d_conv(conv, xBC, torch.randn(16, 4), None, "silu", None)
    assert conv.strides == [(80, 5, 1)] and y.shape == (2, 16, 5)
