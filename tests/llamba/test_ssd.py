"""The scan: chunked against the definition, the definition against mamba-ssm's own PyTorch reference, gradients by
gradcheck, and adapters of CUDA kernels against stand-ins that follow the kernels' documented recurrences.
"""

import importlib.util
import math
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llamba.kernels import (
    causal_conv,
    causal_conv1d_conv,
    fla_scan,
    kernels_for,
    plain_scan,
)
from llamba.ssd import ssd_chunked, ssd_definition, ssd_step


def inputs(length, H=4, G=2, P=3, N=5, batch=2, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    log_decay = -F.softplus(normal(batch, length, H))
    return normal(batch, length, H, P), log_decay, normal(batch, length, G, N), normal(batch, length, G, N)


def state(H=4, P=3, N=5, batch=2, dtype=torch.float64, seed=1):
    return torch.randn(batch, H, P, N, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def documents(length, batch=2, seed=2):
    """Returns document numbers that change at random places, different in every row."""
    starts = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) < 0.2
    return starts.cumsum(1)


# On both sides of a chunk's edge, one token, one token over, and several chunks with a ragged end.
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 17, 45])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
def test_chunked_equals_the_definition(length, with_state, with_documents):
    args = inputs(length)
    initial = state() if with_state else None
    seq_idx = documents(length) if with_documents else None
    y, final = ssd_chunked(*args, 8, initial, seq_idx)
    expected_y, expected_final = ssd_definition(*args, initial, seq_idx)
    torch.testing.assert_close(y, expected_y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(final, expected_final, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("H,G", [(4, 4), (4, 1), (6, 3)])
def test_value_heads_share_query_heads_in_order(H, G):
    x, log_decay, B_, C = inputs(19, H=H, G=G)
    y, final = ssd_chunked(x, log_decay, B_, C, 8)
    repeated = ssd_definition(x, log_decay, B_.repeat_interleave(H // G, 2), C.repeat_interleave(H // G, 2))
    torch.testing.assert_close(y, repeated[0])
    torch.testing.assert_close(final, repeated[1])


def test_gradients_of_the_chunked_form_by_gradcheck():
    x, log_decay, B_, C = (t.requires_grad_() for t in inputs(7, H=2, G=1, P=2, N=2, batch=1))
    initial = state(H=2, P=2, N=2, batch=1).requires_grad_()
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2, 2]])
    assert torch.autograd.gradcheck(lambda *a: ssd_chunked(*a[:4], 3, a[4]), (x, log_decay, B_, C, initial))
    assert torch.autograd.gradcheck(lambda *a: ssd_chunked(*a[:4], 3, a[4], seq_idx), (x, log_decay, B_, C, initial))


def test_gradients_equal_those_of_the_definition_in_float32():
    grads = []
    for scan in (lambda *a: ssd_chunked(*a, 8), ssd_definition):
        args = [t.requires_grad_() for t in inputs(21, dtype=torch.float32)]
        y, final = scan(*args)
        (y.square().sum() + final.square().sum()).backward()
        grads.append([t.grad for t in args])
    for chunked, defined in zip(*grads, strict=True):
        torch.testing.assert_close(chunked, defined, rtol=2e-4, atol=2e-4)


def test_a_sequence_in_pieces_equals_the_whole():
    args = inputs(23)
    whole, whole_state = ssd_chunked(*args, 8)
    ys, carried = [], None
    for start, end in [(0, 5), (5, 13), (13, 23)]:
        y, carried = ssd_chunked(*(t[:, start:end] for t in args), 8, carried)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), whole)
    torch.testing.assert_close(carried, whole_state)


def test_single_steps_equal_the_chunked_form():
    args = inputs(9)
    carried, ys = torch.zeros_like(state()), []
    for t in range(9):
        y, carried = ssd_step(*(a[:, t] for a in args), carried)
        ys.append(y)
    y, final = ssd_chunked(*args, 4)
    torch.testing.assert_close(torch.stack(ys, 1), y)
    torch.testing.assert_close(carried, final)


def test_a_document_does_not_see_the_one_before():
    x, log_decay, B_, C = inputs(20)
    seq_idx = torch.tensor([[0] * 11 + [1] * 9] * 2)
    y, final = ssd_chunked(x, log_decay, B_, C, 8, None, seq_idx)
    alone, alone_final = ssd_chunked(x[:, 11:], log_decay[:, 11:], B_[:, 11:], C[:, 11:], 8)
    torch.testing.assert_close(y[:, 11:], alone)
    torch.testing.assert_close(final, alone_final)
    leaky, _ = ssd_chunked(x, log_decay, B_, C, 8)
    assert (leaky[:, 11:] - alone).abs().max() > 1e-2  # or this test could not fail


def test_bfloat16_is_summed_in_float32():
    args = inputs(300, dtype=torch.bfloat16)
    y, final = ssd_chunked(*args, 64)
    expected, expected_final = ssd_definition(*(t.float() for t in args))
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    torch.testing.assert_close(y, expected.bfloat16())
    torch.testing.assert_close(final, expected_final, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("A_log", [-80.0, 80.0])
def test_strong_and_weak_decay_stay_finite(A_log):
    x, _, B_, C = (t.requires_grad_() for t in inputs(40, dtype=torch.float32))
    A_log = torch.full((2, 40, 4), A_log, requires_grad=True)
    y, _ = ssd_chunked(x, -F.softplus(A_log), B_, C, 16)
    y.sum().backward()
    torch.testing.assert_close(y, ssd_definition(x, -F.softplus(A_log), B_, C)[0], rtol=1e-4, atol=1e-4)
    assert all(t.grad.isfinite().all() for t in (x, A_log, B_, C))


# --- mamba-ssm's own reference ------------------------------------------------------------------------------


@pytest.fixture
def mamba_reference(monkeypatch):
    """Returns `ssd_minimal_discrete` of an installed mamba-ssm. Its module also names the Triton scan, which a machine
    without CUDA cannot import and this test does not use.
    """
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None:
        pytest.skip("mamba-ssm is not installed; `make setup` brings its Python files")
    triton_scan = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    triton_scan.mamba_chunk_scan_combined = None
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, triton_scan.__name__, triton_scan)
    file = Path(spec.submodule_search_locations[0]) / "modules" / "ssd_minimal.py"
    reference = importlib.util.module_from_spec(importlib.util.spec_from_file_location("ssd_minimal", file))
    reference.__spec__.loader.exec_module(reference)
    return reference.ssd_minimal_discrete


@pytest.mark.parametrize("with_state", [False, True])
def test_chunked_equals_mamba_ssm(mamba_reference, with_state):
    x, log_decay, B_, C = inputs(48, G=4)
    initial = state() if with_state else None
    y, final = ssd_chunked(x, log_decay, B_, C, 16, initial)
    reference_state = None if initial is None else initial[:, None]  # (B, 1, H, P, N)
    expected, expected_final = mamba_reference(x, log_decay, B_, C, 16, reference_state)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(final, expected_final)


# --- adapters of the CUDA kernels ---------------------------------------------------------------------------


def fla_stand_in(q, k, v, g, scale, initial_state, output_final_state):
    """Runs chunk_simple_gla by its recurrence: S_t = exp(g) S_{t-1} + k v^T, o_t = S_t^T (scale q), S (B, H, K, V)."""
    assert output_final_state
    S = torch.zeros(*k.shape[:1], k.shape[2], k.shape[3], v.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(q.shape[1]):
        S = g[:, t].exp()[..., None, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, scale * q[:, t]))
    return torch.stack(outputs, 1), S


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
def test_the_adapter_feeds_fla_what_it_means(with_state, with_documents):
    args = inputs(13, dtype=torch.float32)
    initial = state(dtype=torch.float32) if with_state else None
    seq_idx = documents(13) if with_documents else None
    y, final = fla_scan(fla_stand_in, *args, 8, initial_state=initial, seq_idx=seq_idx)
    expected_y, expected_final = ssd_chunked(*args, 8, initial, seq_idx)
    torch.testing.assert_close(y, expected_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final, expected_final, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["identity", "silu"])
@pytest.mark.parametrize("with_past", [False, True])
@pytest.mark.parametrize("length", [1, 3, 9])
def test_convolution_is_causal_and_continues_from_its_past(activation, with_past, length):
    torch.manual_seed(0)
    x, past = torch.randn(2, 6, length), torch.randn(2, 6, 4)
    weight, bias = torch.randn(6, 4), torch.randn(6)
    y = causal_conv(x, weight, bias, activation, past if with_past else None)
    before = past if with_past else torch.zeros_like(past)
    full = torch.cat([before, x], dim=-1)
    for t in range(length):
        expected = (full[..., t + 1 : t + 5] * weight).sum(-1) + bias
        expected = expected if activation == "identity" else F.silu(expected)
        torch.testing.assert_close(y[..., t], expected)

    def stand_in(x, weight, bias, activation):  # causal_conv1d_fn by its definition
        assert activation in (None, "silu")
        return causal_conv(x, weight, bias, activation or "identity", None)

    fast = causal_conv1d_conv(stand_in, x, weight, bias, activation, past if with_past else None)
    torch.testing.assert_close(fast, y)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8])
def test_widths_that_the_kernel_has_not_take_the_plain_form(width):
    """As causal-conv1d's C++ checks its arguments: `width >= 2 && width <= 4`."""
    widths = []

    def kernel(x, weight, bias, activation):
        widths.append(weight.shape[1])
        return causal_conv(x, weight, bias, activation or "identity", None)

    x, past, weight, bias = torch.randn(2, 8, 9), torch.randn(2, 8, width), torch.randn(8, width), torch.randn(8)
    for before in (None, past):
        y = causal_conv1d_conv(kernel, x, weight, bias, "silu", before)
        torch.testing.assert_close(y, causal_conv(x, weight, bias, "silu", before))
    assert widths == [width] * (2 if 2 <= width <= 4 else 0)


def test_the_cpu_takes_the_plain_forms():
    kernels = kernels_for("cpu", torch.float32)
    assert kernels.scan is plain_scan and kernels.conv is causal_conv
    assert math.isfinite(kernels.scan(*inputs(5, dtype=torch.float32), 4)[0].sum())


def test_the_plain_scan_keeps_its_inputs_alone_for_backward():
    given = [m.requires_grad_() for m in inputs(64)]
    known = {m.data_ptr() for m in given}
    results = []
    for scan in (plain_scan, ssd_chunked):
        kept = {}

        def keep(tensor, kept=kept):
            if tensor.data_ptr() not in known:
                kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y, state = scan(*given, 16)
        results.append((y, *torch.autograd.grad(y.square().sum() + state.sum(), given), sum(kept.values())))
    for one, other in zip(*(found[:-1] for found in results), strict=True):
        assert torch.equal(one, other)
    assert results[0][-1] == 0 < results[1][-1]
