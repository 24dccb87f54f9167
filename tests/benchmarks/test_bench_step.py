"""benchmarks/bench_step.py in its quick mode, with the candidates that need no other library: its rows, and its losses
against those of all ranks' batch, computed here in one piece.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distillation.losses import compute_distill_loss
from text.batch import Batch

pytestmark = pytest.mark.bench
ROOT = Path(__file__).parents[2]
KEYS = ("seconds", "default_seconds", "peak_bytes", "ratio_to_baseline", "tokens_per_s")


def logits_and_batch(case):
    """Returns both models' logits, and the batch, of all ranks' windows in the first step."""
    from step_models import build_student, build_teacher, windows_of

    batch = Batch.from_windows(windows_of(case)[0].flatten(0, 1))  # (W*B, S)
    with torch.no_grad():
        student = build_student(case)(batch.input_ids).logits  # (W*B, S, V)
        teacher = build_teacher(case)(batch.input_ids).logits  # (W*B, S, V)
    return student, teacher, batch


def losses_of(student, teacher, batch, labels=None):
    labels = batch.labels if labels is None else labels
    figures = compute_distill_loss(student, teacher, labels, batch.loss_mask, 1.0, 0.1, 1.0)
    return dict(zip(("loss", "kl", "ce"), map(float, figures), strict=True))


def test_quick_mode_from_end_to_end(tmp_path):
    from bench_step import QUICK_CASES
    from step_case import Case

    file = tmp_path / "rows.json"
    options = ["--quick", "--cases", "ranks=1", "--candidates", "ours", "--json", file]
    done = subprocess.run(
        [sys.executable, "benchmarks/bench_step.py", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "| case | candidate |" in done.stdout and "torch" in done.stdout
    rows = json.loads(file.read_text())
    name = QUICK_CASES[0]
    assert [(row["case"], row["candidate"]) for row in rows] == [(name, "plain loop"), (name, "ours")]
    expected = losses_of(*logits_and_batch(Case.parse(name)))
    for row in rows:
        assert all(row[key] > 0 for key in KEYS)
        assert row["tokens_per_s"] == pytest.approx(2 * 32 / row["seconds"])
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert rows[0]["ratio_to_baseline"] == 1
    assert rows[1]["ratio_to_baseline"] == pytest.approx(rows[1]["seconds"] / rows[0]["seconds"])


@pytest.mark.parametrize("candidate", ["plain loop", "ours"])
def test_two_ranks_learn_from_their_own_parts(candidate):
    from bench_step import QUICK_CASES
    from harness import run_child
    from step_case import Case

    result = run_child(str(ROOT / "benchmarks" / "bench_step.py"), "run", QUICK_CASES[1], candidate)
    case = Case.parse(QUICK_CASES[1])
    assert case.ranks == 2
    expected = losses_of(*logits_and_batch(case))
    assert {key: result[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert result["seconds"] > 0 and result["peak_bytes"] > 0


def test_every_mistake_shows_in_the_losses():
    """Each mistake moves the first losses by far more than the tolerance of their comparison."""
    from bench_step import TOLERANCE
    from step_case import Case

    student, teacher, batch = logits_and_batch(Case(vocab=1000, ranks=2, d_model=64, seq_len=32))
    right = losses_of(student, teacher, batch)
    first_rank = Batch(batch.input_ids[:2], batch.labels[:2], batch.loss_mask[:2])
    mistakes = {
        "labels not shifted": losses_of(student, teacher, batch, labels=batch.input_ids)["ce"] / right["ce"],
        "teacher one token off": losses_of(student, teacher.roll(1, dims=1), batch)["kl"] / right["kl"],
        "teacher one entry off": losses_of(student, teacher.roll(1, dims=2), batch)["kl"] / right["kl"],
        "another rank's part": losses_of(student, teacher.roll(2, dims=0), batch)["kl"] / right["kl"],
        "one rank's part alone": losses_of(student[:2], teacher[:2], first_rank)["kl"] / right["kl"],
    }
    assert {name: ratio for name, ratio in mistakes.items() if abs(ratio - 1) < 20 * TOLERANCE} == {}


def row_of(candidate, case="V=8 ranks=1", **figures):
    return {"case": case, "candidate": candidate, **figures}


def test_losses_that_differ_are_refused():
    from bench_step import check_losses

    base = row_of("plain loop", loss=3.0, kl=1.0, ce=2.9)
    check_losses([base, row_of("ours", loss=3.0 + 1e-6, kl=1.0, ce=2.9), row_of("trl gkd", kl=1.0 - 1e-6)])
    check_losses([base, row_of("trl gkd", note="not installed: trl")])
    check_losses([base, row_of("plain loop", "V=9 ranks=1", kl=2.0), row_of("trl gkd", "V=9 ranks=1", kl=2.0)])
    with pytest.raises(ValueError, match="V=8 ranks=1: the first kl of 'trl gkd' is 1.001"):
        check_losses([base, row_of("trl gkd", kl=1.001)])
    with pytest.raises(ValueError, match="the first ce of 'ours'"):
        check_losses([base, row_of("ours", loss=3.0, kl=1.0, ce=2.899)])


def test_a_case_is_what_its_name_says():
    from bench_step import CASES
    from step_case import Case

    assert Case.parse("V=1000 ranks=2 d_model=64 seq_len=32") == Case(1000, 2, 64, 32)
    assert {(case.vocab, case.ranks, case.tokens) for case in map(Case.parse, CASES)} == {
        (vocab, ranks, ranks * 1024) for vocab in (32000, 128256) for ranks in (1, 2)
    }


@pytest.mark.parametrize("candidate,needed", [("trl gkd", "trl"), ("ours --compile", "a C.. compiler")])
def test_what_a_candidate_lacks_is_named(candidate, needed, monkeypatch):
    import bench_step
    from harness import NotInstalled

    monkeypatch.setattr("harness.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("processes.devices.can_compile", lambda device_type: False)
    with pytest.raises(NotInstalled, match=needed):
        bench_step.run("V=8 ranks=1", candidate)


def test_the_recorder_leaves_out_what_was_held_before():
    from step_case import STEPS
    from step_models import Recorder

    held = torch.ones(2**25)  # 128 MiB
    recorder = Recorder()
    recorder.start()
    for step in range(STEPS):
        torch.ones(2**24 if step else 2**25)  # 64 MiB, at first 128
        recorder.step_done({"kl": float(step)})
    result = recorder.result()
    assert result["kl"] == 0  # the first step's
    assert result["peak_bytes"] == pytest.approx(2**27, rel=0.1)
    assert held.sum() == held.numel()
