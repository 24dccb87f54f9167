"""What `make gpu-check` says about numbers: of kernels and products, tried on a CPU with broken ones that are played,
and of a benchmark's rows.
"""

import pytest
import torch

from llamba import kernels as chosen
from llamba.kernels import Kernels, causal_conv, plain_scan
from llamba.mamba_scan import mamba_scan
from preflight.checks.basics import FAILURE, OK, WARNING, run_check
from preflight.gpu_check import bench, numerics
from preflight.gpu_check.results import LEFT_OUT, NOT_APPLICABLE
from tests.llamba import mamba_kernels
from tests.preflight.gpu_checks import session


def found(name):
    return list(run_check(name, numerics.CHECKS[name], None))


def with_scan(monkeypatch, scan, name="mamba-ssm"):
    kernels = Kernels(name, scan, "plain PyTorch", causal_conv)
    monkeypatch.setitem(chosen._chosen, ("cpu", numerics.DTYPE), kernels)


def test_on_a_cpu_the_plain_forms_are_right():
    (products,), (mixer,), (block,), (scan,) = (found(name) for name in ("products", "mixer", "block", "scan"))
    assert {products.status, mixer.status, block.status, scan.status} == {OK}
    assert any("gradient of mlp.down_proj.weight" in line for line in block.figures)
    assert "in place" in products.found and "scan by plain PyTorch" in mixer.found
    items = [line.split("|")[1].strip() for line in mixer.figures[2:]]
    assert {"output", "gradient of input", "gradient of in_proj.weight (A_log)"} <= set(items)
    cases = [line.split("|")[1].strip() for line in scan.figures[2:]]
    assert {"64 tokens, A_log about -8", "57 tokens, A_log about 2", "5 tokens, A_log about 0"} <= set(cases)
    assert "with a first state" in cases
    (operators,) = found("operators")
    assert operators.status == NOT_APPLICABLE


def test_a_wrong_kernel_is_a_failure_that_names_the_next_thing(monkeypatch):
    def mixed_heads(x, *rest, **states):
        y, state = plain_scan(x, *rest, **states)
        return y.roll(1, dims=2), state

    with_scan(monkeypatch, mixed_heads)
    for name in ("mixer", "block", "scan"):
        (wrong,) = found(name)
        assert wrong.status == FAILURE and "0.05 is allowed" in wrong.found and "scan by mamba-ssm" in wrong.found
        assert "llamba/kernels.py" in wrong.remedy and len(wrong.lines) > 5


def test_a_kernel_that_loses_bits_is_a_warning(monkeypatch):
    """It is within what the doctor allows, and several times what rounding explains."""

    def noisy(x, *rest, **states):
        y, state = plain_scan(x, *rest, **states)
        return y + 0.02 * y.detach().abs().mean() * torch.randn_like(y), state

    with_scan(monkeypatch, noisy)
    (noise,) = found("scan")
    assert noise.status == WARNING and "times as much as by rounding" in noise.found and noise.remedy


def test_the_operator_of_the_scan_passes(monkeypatch):
    with_scan(monkeypatch, mamba_scan(mamba_kernels))
    assert [(one.status, one.name) for one in found("operators")] == [
        (OK, "operator of the scan"),
        (OK, "operator of the scan with a first state"),
    ]


def test_totals_that_are_not_added_to_in_place_are_a_failure(monkeypatch):
    monkeypatch.setattr(numerics, "add_product", lambda total, a, b: total + a.float() @ b.float())
    (products,) = found("products")
    assert products.status == FAILURE and "addmm" in products.remedy


# --- the benchmark -------------------------------------------------------------------------------------------

CARD = {"section": "card", "case": "product in bfloat16", "candidate": "torch", "TFLOP_per_s": 788.0}
STEP = {"section": "step", "case": "batch 2", "candidate": "--batch_size 2", "seconds": 0.4, "tokens_per_s": 5000}
STEP |= {"mfu": 0.5, "peak_bytes": 60e9, "planned_bytes": 61e9, "loss": 12.0, "n_layer": 32}


def judged(row, **changes):
    return bench.judge(row["section"], [row | changes], ["python", "benchmarks/bench_gpu.py", "--short"], on_gpu=True)


def test_a_step_is_measured_against_the_matrix_rate_and_the_plan():
    good = judged(STEP)
    assert good.status == OK and good.found == "5000 tokens/s, MFU 0.50 of the measured matrix rate (batch 2)"
    assert good.figures[0] == "| case | candidate | ms | memory, GB | planned, GB | tokens/s | MFU | layers |"
    assert good.figures[2] == "| batch 2 | --batch_size 2 | 400 | 60.0 | 61.0 | 5000 | 0.5 | 32 |"
    slow, large = judged(STEP, mfu=0.3), judged(STEP, peak_bytes=62e9)
    assert slow.status == WARNING and "0.45 is the aim" in slow.found and "profile" in slow.remedy
    assert large.status == WARNING and "took 62.0 GB, 61.0 are planned" in large.found
    assert judged(STEP, planned_bytes=None).status == OK


def test_the_other_sections_in_a_line_each():
    assert judged(CARD).found == "788.0 TFLOP/s"
    part = {"section": "profile", "case": "batch 2", "candidate": "part: loss", "seconds": 0.1, "share": 0.25}
    assert judged(part).found == "loss 25%"
    row = {"section": "loss", "case": "V=9", "candidate": "liger", "note": "not installed: liger_kernel"}
    assert judged(row).found == "0 forms timed, all right within rounding; not installed: liger_kernel"


def test_a_row_with_an_error_is_a_failure_with_the_command_to_repeat():
    wrong = judged(STEP, error="OutOfMemoryError: tried to allocate")
    assert wrong.status == FAILURE and wrong.found == "batch 2, --batch_size 2: OutOfMemoryError: tried to allocate"
    assert wrong.remedy == "python benchmarks/bench_gpu.py --short --sections step"


@pytest.mark.parametrize("code", ["sys.exit(3)", "open(sys.argv[2], 'w').write('[]')"])
def test_a_benchmark_that_dies_is_a_failure(tmp_path, monkeypatch, code):
    monkeypatch.setattr(bench, "SCRIPT", tmp_path / "bench.py")
    (tmp_path / "bench.py").write_text(f"import sys\nprint('so far')\n{code}\n")
    findings = list(bench.check(session(tmp_path)))
    assert [one.status for one in findings] == [NOT_APPLICABLE, *([FAILURE] if "exit" in code else [])]
    if "exit" in code:
        assert findings[1].found == "exit code 3" and findings[1].lines == ["so far"]
    assert [one.status for one in bench.check(session(tmp_path, seconds=1))] == [LEFT_OUT]
