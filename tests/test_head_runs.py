"""Runs with heads of the teacher (`--heads`), on small random models: frozen, killed and resumed, without a teacher
beside, aligned, and scored.
"""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import eval_mmlu_hybrid
from evaluation import mmlu, mmlu_files
from model_utils import apply_replacements
from tests import fresh, small_runs
from tests.eval_models import TINY
from tests.faults.compare import differences
from tests.faults.traps import killing_at
from tests.small_runs import make_models, read_metrics
from tests.tiny import tiny_student, tiny_teacher

HEADS = {1: [0, 2, 3], 2: [3]}  # of layer 1 two share a key/value head
PAIRS = ["1:0", "1:2", "1:3", "2:3"]
KEPT = ".attention."


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def options(models, output_dir, **changes):
    values = dict(student_model=models / "plain", layers="3", heads="2:3,1:0 1:2,1:3", freeze_replaced_layers=True)
    values |= dict(max_steps=4, save_interval=2, warmup_ratio=0.0, resume="auto")
    return small_runs.options(models, output_dir, **{**values, **changes})


def train(argv, n_ranks=2):
    codes, log = fresh.ranks(argv, n_ranks)
    assert codes == [0] * n_ranks, log[-4000:]
    return log


@pytest.fixture(scope="module")
def straight(models, tmp_path_factory):
    """Returns the folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("run") / "straight"
    (folder.parent / "log.txt").write_text(train(options(models, folder)))
    return folder


def start_of(models):
    """Returns the model that a run begins with."""
    student = AutoModelForCausalLM.from_pretrained(models / "plain")
    apply_replacements(student, AutoModelForCausalLM.from_pretrained(models / "teacher"), [3], HEADS)
    return student.state_dict()


def weights_of(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()


def test_heads_are_the_teachers_and_only_what_is_not_frozen_moves(models, straight):
    before, after = start_of(models), weights_of(straight / "checkpoint-4")
    assert before.keys() == after.keys()
    frozen = {name for name in before if KEPT in name or ".layers.3." in name}
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    assert sum(KEPT in name for name in frozen) == 2 * 4
    assert yaml.safe_load((straight / "args.yaml").read_text())["heads"] == PAIRS
    log = (straight.parent / "log.txt").read_text()
    assert "student with --layers 3 --heads 1:0,1:2,1:3,2:3 from the teacher" in log
    kept = sum(before[name].numel() for name in before if KEPT in name)
    assert f"kept heads{kept:>26,}{0:>16}{kept:>16,}{'-':>16}" in log


def kill_in_the_third_update(rank):
    killing_at("in an update", 3, 1)(rank)


def test_a_killed_run_is_resumed_and_no_other_heads_are_taken(models, straight):
    killed = straight.parent / "killed"
    codes, log = fresh.ranks(options(models, killed), 2, arm=kill_in_the_third_update)
    assert codes == [-9, -9], log[-4000:]
    codes, log = fresh.ranks(options(models, killed, heads="1:0"), 2)
    assert 2 in codes and "--heads 1:0: the run of" in log and f"has {' '.join(PAIRS)}; give" in log
    train(options(models, killed))
    assert differences(straight, killed, 4) == []


def test_without_a_teacher_beside_all_ranks_get_its_heads(models, tmp_path):
    train(options(models, tmp_path / "out", kl_weight=0.0, max_steps=1, save_interval=1))
    before, after = start_of(models), weights_of(tmp_path / "out" / "checkpoint-1")
    assert all(torch.equal(before[name], after[name]) for name in before if KEPT in name)


def test_mixers_are_aligned_beside_heads(models, tmp_path):
    log = train(options(models, tmp_path / "out", stage="align", freeze_replaced_layers=None, compile=None))
    before, after = start_of(models), weights_of(tmp_path / "out" / "checkpoint-4")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if ".mixer." in name
    }
    assert [row["alignment"]["layers"] for row in read_metrics(tmp_path / "out")] == [[0, 1, 2]] * 4
    assert "--layers 3 --heads 1:0,1:2,1:3,2:3\n" in log


def test_both_hybrids_are_scored_with_the_heads_of_the_checkpoint(models, straight, tmp_path):
    argv = ["--teacher_model", models / "teacher", "--student_model", models / "plain", "--dtype", "float32"]
    argv += ["--ckpt", straight / "latest", "--which", "hybrid", "hybrid_ft", "--device", "cpu", "--local_files_only"]
    argv += ["--mmlu_dir", TINY / "mmlu", "--num_fewshot", "2", "--limit", "1", "--output", tmp_path / "eval.json"]
    argv += ["--max_length", "128"]
    code, log = fresh.script([str(word) for word in argv], eval_mmlu_hybrid.main)
    assert code == 0, log
    report = json.loads((tmp_path / "eval.json").read_text())["models"]
    assert [(found["config"]["layers"], found["config"]["heads"]) for found in report.values()] == [([3], PAIRS)] * 2
    hybrid = tiny_student(vocab_size=1024)
    apply_replacements(hybrid, tiny_teacher(vocab_size=1030), [3], HEADS)
    loaded = {"hybrid": hybrid, "hybrid_ft": AutoModelForCausalLM.from_pretrained(straight / "checkpoint-4").eval()}
    questions = mmlu.build_questions(mmlu_files.load_mmlu(TINY / "mmlu"), num_fewshot=2, limit=1)
    tokenizer = AutoTokenizer.from_pretrained(models / "teacher")
    for name, model in loaded.items():
        expected = mmlu.score(model, tokenizer, questions, 1, torch.device("cpu"), 128)
        for got, wanted in zip(report[name]["predictions"], expected, strict=True):
            assert got["log_likelihoods"] == pytest.approx(wanted.log_likelihoods, abs=1e-4)
    assert "3 1:0 1:2 1:3 2:3" in (tmp_path / "eval.md").read_text()
    code, log = fresh.script([*map(str, argv), "--overwrite", "--heads", "1:0"], eval_mmlu_hybrid.main)
    assert code == 2 and "was trained with --layers 3 --heads 1:0,1:2,1:3,2:3" in log
