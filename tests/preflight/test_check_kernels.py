"""What doctor.py finds about kernels: broken ones are played, and each has to be seen."""

import pytest
import torch

from llamba import LlambaConfig
from llamba.elementwise import PLAIN_ELEMENTWISE
from llamba.kernels import Kernels, causal_conv, plain_kernels, plain_scan
from llamba.ssd import ssd_chunked
from preflight.checks import kernels as checks
from preflight.checks.basics import FAILURE, OK, WARNING
from tests.preflight.cases import found, statuses
from tests.tiny import tiny_config

CPU = torch.device("cpu")


def broken(form, spoil):
    def wrong(*inputs, **rest):
        return spoil(form, *inputs, **rest)

    return wrong


def mixed_heads(form, x, *rest, **states):
    y, state = form(x, *rest, **states)
    return y.roll(1, dims=2), state


def slow_decay(form, x, log_decay, *rest, **states):
    return form(x, log_decay * 0.5, *rest, **states)


def no_gradient_of_B(form, x, log_decay, B_, *rest, **states):
    return form(x, log_decay, B_.detach() + 0 * B_, *rest, **states)


def no_number(form, x, *rest, **states):
    y, state = form(x, *rest, **states)
    return torch.where(torch.arange(y.shape[1])[:, None, None] == 7, torch.nan, y), state


def no_first_state(form, x, log_decay, B_, C, chunk_size, initial_state=None, seq_idx=None):
    return form(x, log_decay, B_, C, chunk_size, None if initial_state is None else 0 * initial_state)


def only_dense_inputs(form, x, *rest, **states):
    """Reads x as if its tokens lay one behind another, which in a mixer they do not."""
    dense = torch.empty(x.shape, device="meta").stride()
    return form(x.as_strided(x.shape, dense), *rest, **states)


def divided_by_dt(form, x, log_decay, B_, C, chunk_size, initial_state=None, seq_idx=None):
    """Gets x / dt in the dtype of x, as mamba-ssm's own function: where heads forget slowly the gradient of dt is a
    small difference of large sums.
    """
    dt = -log_decay
    scaled = (x / dt[..., None]).to(x.dtype)
    exact = scaled.float() * dt[..., None], -dt, B_.float(), C.float()
    y, state = ssd_chunked(*exact, chunk_size, initial_state)
    return y.to(x.dtype), state


def late(form, x, *rest):
    return form(x.roll(1, dims=-1), *rest)


def no_past(form, x, weight, bias, activation, past):
    return form(x, weight, bias, activation, None)


def same(form, *inputs, **rest):
    return form(*inputs, **rest)


def compared(kernels, dtype):
    return list(checks.compare_kernels(kernels, CPU, dtype, tiny_config(), length=64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "scan", [same, mixed_heads, slow_decay, no_gradient_of_B, no_number, no_first_state, only_dense_inputs]
)
def test_a_broken_scan_is_a_failure(scan, dtype):
    kernels = Kernels("mamba-ssm", broken(plain_scan, scan), "plain PyTorch", causal_conv)
    finding, conv, mixer = compared(kernels, dtype)
    assert finding.name == f"scan, {str(dtype)[6:]}" and conv.status == WARNING and "causal-conv1d" in conv.remedy
    assert finding.status == (OK if scan is same else FAILURE), finding
    assert bool(finding.remedy) == (scan is not same)
    seen = scan not in (same, no_first_state)  # a mixer that trains has no first state
    assert mixer.name == f"mixer, {str(dtype)[6:]}" and mixer.status == (FAILURE if seen else OK), mixer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv", [same, late, no_past])
def test_a_broken_convolution_is_a_failure(conv, dtype):
    kernels = Kernels("plain PyTorch", plain_scan, "causal-conv1d", broken(causal_conv, conv))
    scan, finding, mixer = compared(kernels, dtype)
    assert finding.status == (OK if conv is same else FAILURE), finding
    assert scan.status == WARNING and "mamba-ssm" in scan.remedy
    assert mixer.status == (FAILURE if conv is late else OK), mixer


def test_noise_in_the_gradient_of_slow_heads_is_seen():
    """It is not seen where A_log is about 0."""
    kernels = Kernels("mamba-ssm", broken(plain_scan, divided_by_dt), "plain PyTorch", causal_conv)
    scan, *_ = compared(kernels, torch.bfloat16)
    assert scan.status == FAILURE and "A_log about -8" in scan.found
    errors = checks.scan_errors(kernels, CPU, torch.bfloat16, tiny_config(), 64)
    assert errors["64 tokens, A_log about 0"] < checks.TOLERANCE[torch.bfloat16]


def no_gradient_of_the_last(form, *inputs):
    *others, last, eps = inputs if isinstance(inputs[-1], float) else (*inputs, None)
    last = last.detach() + 0 * last
    return form(*others, last) if eps is None else form(*others, last, eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name,title,wrong",
    [
        ("gate", "gate", same),
        ("gate", "gate", no_gradient_of_the_last),
        ("swiglu", "SwiGLU", no_gradient_of_the_last),
        ("rms_norm", "norm", no_gradient_of_the_last),
    ],
)
def test_a_broken_norm_or_gate_is_a_failure(name, title, wrong, dtype):
    form = PLAIN_ELEMENTWISE._replace(name="fused", **{name: broken(getattr(PLAIN_ELEMENTWISE, name), wrong)})
    finding = compared(plain_kernels()._replace(elementwise=form), dtype)[0]
    assert finding.name == f"norms and gates, {str(dtype)[6:]}"
    assert finding.status == (OK if wrong is same else FAILURE), finding
    assert wrong is same or (f"({title})" in finding.found and "TORCHDYNAMO_DISABLE=1" in finding.remedy)


def test_kernels_of_a_real_size_are_within_their_tolerance():
    torch.manual_seed(0)  # one draw of 150 had a gradient of D, two numbers here, so small that its error was 11%
    kernels = Kernels("mamba-ssm", plain_scan, "causal-conv1d", causal_conv)
    small = LlambaConfig(d_model=256, ssm_cfg={"n_v_heads": 2, "n_qk_heads": 2})  # with the published head's width
    assert statuses(checks.compare_kernels(kernels, CPU, torch.bfloat16, small, length=256)) == [OK, OK, OK]


def test_kernels_of_a_cpu_are_plain():
    assert [finding.found for finding in found(checks.check_kernels)] == ["plain PyTorch, as always on a CPU"]
