"""`make demo`, whole: two students and the tiny teacher, four minutes on two cores, and what must have come of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from arguments import parse_train_args
from data import build_dataloader
from distillation.losses import compute_distill_loss
from model_utils import get_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    # This interpreter's packages, whatever .venv holds.
    make = ["make", "--old-file=.venv/installed", f"BIN={Path(sys.executable).parent}", f"DEMO={folder}", "demo"]
    result = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder, result.stdout


def steps(folder):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


@torch.no_grad()
def held_out_kl(folder, step):
    """Mean KL(teacher || checkpoint) per token of text that no model was trained on."""
    args = parse_train_args(["--preset", "tiny", "--no_dataset_streaming"])
    args.dataset_name = str(ROOT / "presets" / "tiny" / "text" / "heldout.jsonl")
    args.dataset_cache_dir = str(folder / "cache")
    loader = build_dataloader(
        args, get_tokenizer("--teacher_model", args.teacher_model), rank=0, world_size=1, is_builder=True
    )
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher_model, dtype=torch.float32).eval()
    student = AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{step}", dtype=torch.float32).eval()
    kls = []
    for batch in loader:
        logits = student(batch.input_ids).logits, teacher(batch.input_ids).logits
        kls.append(compute_distill_loss(*logits, batch.labels, batch.loss_mask, 0.0, 1.0, 1.0)[1])
    return torch.stack(kls).mean().item()


@pytest.mark.timeout(1000)
def test_the_demo_teaches_the_hybrid_to_look_things_up(demo):
    folder, stdout = demo
    scores = json.loads((folder / "eval.json").read_text())
    assert scores["n"] >= 200
    assert scores["teacher"] >= 0.90
    assert scores["student"] <= 0.45
    assert scores["hybrid_ft"] >= 0.85
    assert "hybrid_ft" in (folder / "report" / "index.html").read_text()
    for name in ("teacher", "student", "hybrid", "hybrid_ft"):
        assert name in stdout


@pytest.mark.timeout(1000)
def test_the_demo_brings_the_hybrid_close_to_its_teacher(demo):
    folder, _ = demo
    first, last = steps(folder)[0], steps(folder)[-1]
    assert first == 0
    before, after = held_out_kl(folder, first), held_out_kl(folder, last)
    print(f"held-out KL {before:.3f} -> {after:.3f}")
    assert before >= 5 * after


@pytest.mark.timeout(1000)
def test_the_demo_leaves_its_metrics(demo):
    folder, _ = demo
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows[-1]["micro_step"] == steps(folder)[-1]
    assert rows[-1]["kl"] < rows[0]["kl"] / 2
