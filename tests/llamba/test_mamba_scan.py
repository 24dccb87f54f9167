"""The scan by mamba-ssm's kernels: its calls of them and its gradients, with kernels that are played in PyTorch in the
dtypes of the real ones, and its behaviour as one operator of torch.compile.
"""

import ast
import importlib.util
import inspect
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llamba import LlambaConfig, kernels
from llamba.kernels import Kernels, causal_conv
from llamba.mamba_scan import NEEDED, mamba_scan
from llamba.mixer import DiscreteMamba2
from llamba.ssd import ssd_chunked
from tests.llamba import mamba_kernels

CHUNK = 16


def draw(length, bias, dtype, H=4, G=2, P=16, N=8, batch=1):
    """Draws x, A_log ~ N(bias, 1), B and C, a state, and the gradient of y."""
    torch.manual_seed(0)
    x, d_y = (torch.randn(batch, length, H, P).to(dtype) for _ in range(2))
    A_log = (torch.randn(batch, length, H) + bias).to(dtype)
    B_, C = (torch.randn(batch, length, G, N).to(dtype) for _ in range(2))
    return x, A_log, B_, C, torch.randn(batch, H, P, N), d_y


def run(scan, dtype, x, A_log, B_, C, state, d_y, with_state=True, seq_idx=None):
    """Returns y, the last state, and the gradients of x, A_log, B, C and the first state."""
    leaves = [m.detach().to(dtype).requires_grad_() for m in (x, A_log, B_, C)]
    state = state.to(torch.promote_types(dtype, torch.float32)).requires_grad_() if with_state else None
    log_decay = -F.softplus(leaves[1].to(torch.promote_types(dtype, torch.float32)))
    y, last = scan(leaves[0], log_decay, *leaves[2:], CHUNK, state, seq_idx)
    inputs = leaves if state is None else [*leaves, state]
    loss = (y * d_y.to(y.dtype)).sum() + (last.sin().sum() if with_state else 0)
    return [y, last, *torch.autograd.grad(loss, inputs)]


def error(one, other):
    return ((one.double() - other).norm() / other.norm()).item()


# One chunk that is not full, an edge, one token over, several chunks, one token.
@pytest.mark.parametrize("length", [5, 16, 17, 45, 1])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_documents", [False, True])
def test_results_and_gradients_are_those_of_the_plain_scan(length, with_state, with_documents):
    drawn = draw(length, 0.0, torch.float32, batch=2)
    seq_idx = (torch.rand(2, length) < 0.2).cumsum(1) if with_documents else None
    if with_documents:
        seq_idx = seq_idx - seq_idx[:, :1]  # the kernels let a first state into document 0
    found = run(mamba_scan(mamba_kernels), torch.float32, *drawn, with_state, seq_idx)
    expected = run(ssd_chunked, torch.float64, *drawn, with_state, seq_idx)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("bias", [1.0, -2.0, -4.0, -8.0])
def test_slow_heads_keep_the_bits_of_their_gradient(bias):
    """With x / dt in bfloat16, as mamba-ssm's own function needs it, A_log's gradient at -8 is off by a fifth."""
    drawn = draw(256, bias, torch.bfloat16, P=32, N=16)
    found = run(mamba_scan(mamba_kernels), torch.bfloat16, *drawn)
    errors = [error(one, other) for one, other in zip(found, run(ssd_chunked, torch.float64, *drawn), strict=True)]
    assert max(errors) < 0.005, errors


def test_a_decay_of_nothing_is_no_special_case():
    x, _, B_, C, state, _ = draw(20, 0.0, torch.float32)
    zero = torch.zeros(1, 20, 4)
    for one, other in zip(
        mamba_scan(mamba_kernels)(x, zero, B_, C, CHUNK, state), ssd_chunked(x, zero, B_, C, CHUNK, state), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_played_kernels_have_the_arguments_of_the_real_ones():
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None:
        pytest.skip("mamba-ssm is not installed; `make setup-dev` brings its Python files")
    real = {}
    for file in (Path(spec.submodule_search_locations[0]) / "ops" / "triton").glob("ssd_*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                real[node.name] = [argument.arg for argument in node.args.args]
    for name in NEEDED:
        assert real[name] == list(inspect.signature(getattr(mamba_kernels, name)).parameters), name
    combined = (Path(spec.submodule_search_locations[0]) / "ops" / "triton" / "ssd_combined.py").read_text()
    imported = {
        alias.name for node in ast.parse(combined).body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    own = {node.name for node in ast.parse(combined).body if isinstance(node, ast.FunctionDef)}
    assert imported | own >= NEEDED


def test_an_unknown_version_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: spec_of_a_package())
    monkeypatch.setattr(kernels, "_optional", lambda name: kernels)  # a module without any of them
    monkeypatch.setattr(kernels.importlib, "import_module", lambda name: kernels)
    assert kernels._mamba_ssm_triton() is None
    assert "this version of its scan has no _bmm_chunk_bwd, _bmm_chunk_fwd" in caplog.text


@pytest.mark.parametrize("given,found", [(None, "1"), ("0", "0")])
def test_the_forms_of_the_kernels_that_triton_chose_are_kept_on_disk(monkeypatch, given, found):
    """It decides by the environment when the kernels are imported."""
    monkeypatch.setenv("TRITON_CACHE_AUTOTUNING", given or "")
    if given is None:
        monkeypatch.delenv("TRITON_CACHE_AUTOTUNING")
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: spec_of_a_package())
    monkeypatch.setattr(kernels.importlib, "import_module", lambda name: kernels)
    seen = []
    monkeypatch.setattr(kernels, "_optional", lambda name: seen.append(os.environ["TRITON_CACHE_AUTOTUNING"]))
    kernels._mamba_ssm_triton()
    assert seen == [found]


def spec_of_a_package():
    spec = importlib.util.spec_from_loader("mamba_ssm", None)
    spec.submodule_search_locations = []
    return spec


def test_a_mixer_compiles_without_a_graph_break(monkeypatch):
    """The scan and its backward pass are one operator each, so the whole mixer is one graph."""
    chosen = Kernels("mamba-ssm", mamba_scan(mamba_kernels), "plain", causal_conv)
    monkeypatch.setitem(kernels._chosen, ("cpu", torch.float32), chosen)
    torch.manual_seed(0)
    ssm = {"d_state": 8, "n_v_heads": 4, "n_qk_heads": 2, "chunk_size": CHUNK}
    mixer = DiscreteMamba2(LlambaConfig(d_model=32, ssm_cfg=ssm))
    u = torch.randn(2, 21, 32, requires_grad=True)
    results = []
    for form in (mixer, torch.compile(mixer, fullgraph=True, backend="aot_eager")):
        y = form(u)
        results.append([y, *torch.autograd.grad(y.square().sum(), [u, *mixer.parameters()])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_the_operators_keep_the_rules_of_torch_library():
    """Fake results have the real ones' shapes, dtypes and strides, and nothing is an alias of an input."""
    x, A_log, B_, C, state, _ = draw(21, 0.0, torch.float32)
    scan = mamba_scan(mamba_kernels)
    operator = next(cell.cell_contents for cell in scan.__closure__)
    inputs = [m.requires_grad_() for m in (x, -F.softplus(A_log), B_, C)]
    for initial in (state.requires_grad_(), None):
        torch.library.opcheck(
            operator,
            (*inputs, CHUNK, initial, None),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
