"""`make demo` and its results: here with 16 of its 200 steps and 20 of its 400 questions; in `make test-slow` whole,
with the scores that it must reach.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_runs import read_metrics

ROOT = Path(__file__).parents[1]
MODELS = ["student", "hybrid", "hybrid_ft", "teacher"]
HELD_OUT = f"--held_out {ROOT / 'presets' / 'tiny' / 'text' / 'heldout.jsonl'}"


def make_demo(folder, *variables):
    """Runs `make demo` with this interpreter's packages; returns the folder that it fills and what it printed."""
    make = ["make", "--old-file=.venv/installed", f"BIN={Path(sys.executable).parent}", f"DEMO={folder}"]
    result = subprocess.run([*make, *variables, "demo"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder, result.stdout


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    steps = "DEMO_TRAIN=--max_steps 16 --warmup_steps 4 --max_lr 0.0005"  # a rate at which few steps help
    questions = f"DEMO_EVAL=--limit 5 {HELD_OUT} --held_out_windows 8"
    return make_demo(tmp_path_factory.mktemp("demo") / "demo", steps, questions)


@pytest.fixture(scope="module")
def whole_demo(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("demo") / "demo", f"DEMO_EVAL={HELD_OUT} --held_out_windows 109")


def held_out_kl(folder):
    """Returns the KL to the teacher, in nats per token, of each model on text that no model was trained on."""
    models = json.loads((folder / "eval.json").read_text())["models"]
    return {name: models[name]["held_out"]["kl"] for name in MODELS}


@pytest.mark.timeout(600)
def test_the_demo_trains_scores_and_reports(short_demo):
    folder, printed = short_demo
    scores = json.loads((folder / "eval.json").read_text())
    assert scores["n"] == 20
    assert scores["teacher"] >= 0.9
    page = (folder / "report" / "index.html").read_text()
    for name in MODELS:
        assert 0 <= scores[name] <= 1 and name in printed and name in page


@pytest.mark.timeout(600)
def test_the_demo_brings_the_hybrid_closer_to_its_teacher(short_demo):
    folder, _ = short_demo
    kl = held_out_kl(folder)
    assert kl["teacher"] < 1e-3
    assert kl["hybrid_ft"] < 0.8 * kl["hybrid"] < 0.8 * kl["student"]
    assert kl["hybrid_ft"] < 0.13  # 0.16 before


@pytest.mark.timeout(600)
def test_the_demo_leaves_its_metrics_and_checkpoints(short_demo):
    folder, _ = short_demo
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-0", "checkpoint-16"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_demo_teaches_the_hybrid_to_look_things_up(whole_demo):
    folder, _ = whole_demo
    scores = json.loads((folder / "eval.json").read_text())
    assert scores["n"] >= 200
    assert scores["teacher"] >= 0.90
    assert scores["student"] <= 0.45
    assert scores["hybrid"] <= 0.70
    assert scores["hybrid_ft"] >= 0.95
    assert held_out_kl(folder)["hybrid_ft"] <= 0.13  # the hybrid before has 0.17
