"""benchmarks/bench_loss.py: its quick mode from end to end, and all candidates compute the same function."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from distillation.losses import compute_distill_loss

pytestmark = pytest.mark.bench
ROOT = Path(__file__).parents[2]
CASE = "V=300 N=130 float32"
PEERS = {
    "liger": "liger_kernel",
    "liger chunk 128": "liger_kernel",
    "torchtune": "torchtune",
    "trl": "trl",
    "trl gkd": "trl",
}


@pytest.fixture
def bench_loss():
    import bench_loss

    return bench_loss


def test_quick_mode_runs_end_to_end(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, "benchmarks/bench_loss.py", "--quick", "--json", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    rows = json.loads(file.read_text())
    assert [row["candidate"] for row in rows] == ["plain", "fused"]
    for row in rows:
        assert row["case"] == "V=2000 N=100 float32"
        assert row["seconds"] > 0 and row["ratio_to_baseline"] > 0 and row["peak_bytes"] >= 0
        assert max(row["loss_error"], row["hidden_grad_error"], row["head_grad_error"]) < 1e-5
        assert f"| {row['case']} | {row['candidate']} |" in output


def test_the_reference_is_the_plain_form_in_float64(bench_loss, tmp_path):
    bench_loss.reference(CASE, str(tmp_path))
    loss, entropy, (d_hidden, d_head) = torch.load(bench_loss.reference_file(CASE, str(tmp_path)))
    inputs = bench_loss.make_inputs(CASE)
    hidden, head = (leaf.detach().double().requires_grad_() for leaf in inputs.leaves())
    teacher_logits = inputs.teacher_hidden.double() @ inputs.teacher_head.double().T  # (N, V)
    batch = (hidden @ head.T)[None], teacher_logits[None], inputs.labels[None], inputs.loss_mask()[None]
    expected, _, _ = compute_distill_loss(*batch, 0.5, 0.5, 1.0)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close([d_hidden, d_head], [hidden.grad, head.grad])
    learned = torch.distributions.Categorical(logits=teacher_logits[inputs.loss_mask()])
    torch.testing.assert_close(entropy, learned.entropy().mean())


@pytest.mark.parametrize("candidate", ["plain", "fused", *PEERS])
def test_candidates_compute_the_same_function(bench_loss, candidate, tmp_path):
    if candidate in PEERS and find_spec(PEERS[candidate]) is None:
        pytest.skip(f"{PEERS[candidate]} is not installed")
    bench_loss.reference(CASE, str(tmp_path))
    inputs = bench_loss.make_inputs(CASE)
    loss = bench_loss.CANDIDATES[candidate](inputs)()
    loss.backward()
    errors = bench_loss.errors(candidate, loss.detach(), inputs, bench_loss.reference_file(CASE, str(tmp_path)))
    assert max(errors.values()) < 1e-5


def test_a_wrong_loss_or_gradient_shows(bench_loss, tmp_path):
    bench_loss.reference(CASE, str(tmp_path))
    inputs = bench_loss.make_inputs(CASE)
    loss = bench_loss.CANDIDATES["plain"](inputs)()
    loss.backward()
    inputs.student_head.grad *= 1.01
    file = bench_loss.reference_file(CASE, str(tmp_path))
    errors = bench_loss.errors("plain", 1.1 * loss.detach(), inputs, file)
    assert errors["loss_error"] == pytest.approx(0.1, rel=1e-3)
    assert errors["head_grad_error"] == pytest.approx(0.01, rel=1e-2)
    assert errors["hidden_grad_error"] < 1e-5


def test_a_case_is_what_its_name_says(bench_loss):
    inputs = bench_loss.make_inputs("V=300 N=130 bfloat16")
    assert inputs.student_head.shape == inputs.teacher_head.shape == (300, bench_loss.D_MODEL)
    assert inputs.student_hidden.shape == inputs.teacher_hidden.shape == (130, bench_loss.D_MODEL)
    assert inputs.student_head.dtype == inputs.teacher_hidden.dtype == torch.bfloat16
    assert 0 < (~inputs.loss_mask()).sum() < 10
    with pytest.raises(ValueError, match="V=300"):
        bench_loss.make_inputs("V=300")
