"""The evaluation entry: run whole on small models made here and on the tiny preset."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import eval_mmlu_hybrid as entry
from arguments import parse_eval_args
from distillation.losses import compute_distill_loss
from evaluation import checks, mmlu, mmlu_files, pieces, statistics
from evaluation.checks import check_inputs
from evaluation.held_out import read_windows
from model_utils import apply_replacements
from processes.ranks import process_groups
from tests import fresh
from tests.eval_models import MODELS, TINY, command_line, only, options_of, save_models
from text.sources import TextSource

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> SimpleNamespace:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def options(models) -> dict[str, list[str]]:
    return options_of(models.root)


def evaluate(options: dict[str, list[str]]) -> None:
    args = parse_eval_args(command_line(options))
    inputs = check_inputs(args)
    with process_groups(inputs.device) as ranks:
        entry.evaluate(args, inputs, ranks)


def test_four_models_are_scored_each_as_itself(models, options, tmp_path, capsys):
    output = tmp_path / "new" / "eval.json"
    evaluate(options | {"output": [str(output)]})
    report = json.loads(output.read_text())

    questions = mmlu.build_questions(mmlu_files.load_mmlu(TINY / "mmlu"), num_fewshot=2, limit=3)
    assert report["n"] == len(questions) == 12
    assert list(report["models"]) == MODELS
    for name in MODELS:
        result = report["models"][name]
        expected = mmlu.score(models.loaded[name], models.tokenizer, questions, 1, torch.device("cpu"), None)
        for question, got, wanted in zip(questions, result["predictions"], expected, strict=True):
            assert (got["subject"], got["index"]) == (question.subject, question.index)
            assert (got["answer"], got["prediction"]) == (question.answer, wanted.prediction)
            assert got["log_likelihoods"] == pytest.approx(wanted.log_likelihoods, abs=1e-4)
        counts = statistics.aggregate(expected)
        assert {key: result[key] for key in counts} == counts
        assert report[name] == counts["acc"]
    likelihoods = [str(report["models"][name]["predictions"][0]["log_likelihoods"]) for name in MODELS]
    assert len(set(likelihoods)) == 4

    configs = [report["models"][name]["config"] for name in MODELS]
    assert [config["layers"] for config in configs] == [[], [0, 2], [0, 2], None]
    assert configs[2]["ckpt"] == options["ckpt"][0] and configs[2]["student_model"] is None
    assert all(config["versions"]["torch"] == torch.__version__ for config in configs)
    assert {(c["num_fewshot"], c["dtype"], c["max_length"]) for c in configs} == {(2, "float32", 512)}
    files = {path.name for path in output.parent.iterdir()}
    assert files == {"eval.json", "eval.md", "eval.png"}  # and no partial results

    models_table, (title, prompt, *table) = (block.splitlines() for block in capsys.readouterr().out.split("\n\n")[:2])
    assert len(models_table) == 2 + 1 + 4  # a blank line, the title, the head, four models
    assert title == "MMLU, 2-shot, 4 subjects, the first 3 questions of each"
    assert prompt.startswith(f"Prompt: {mmlu.PROMPT}. Data: {TINY / 'mmlu'}")
    assert table[0].split() == ["subject", "n", *MODELS]
    assert [line.split()[0] for line in table[1:]] == [
        "animals",
        "colours",
        "meals",
        "tools",
        "all",
        "stderr",
    ]
    assert table[5].split() == ["all", "12", *(f"{report[name]:.4f}" for name in MODELS)]


def test_one_model_is_reported_flat(options, tmp_path):
    output = tmp_path / "eval.json"
    evaluate(only(options, "student") | {"subjects": ["tools"], "output": [str(output)]})
    report = json.loads(output.read_text())
    assert list(report) == ["acc", "stderr", "n", "groups", "subjects", "tokens", "config", "predictions"]
    score = {key: report[key] for key in ("acc", "stderr", "n")}
    assert report["n"] == 3 and report["subjects"] == {"tools": score} and report["groups"] == {}
    assert report["config"]["which"] == "student"


@torch.no_grad()
def test_held_out_figures_are_those_of_full_logits(models, options, tmp_path):
    """On windows in two pieces, the last one not full; the student's padded vocabulary is left out."""
    text, output = tmp_path / "text.txt", tmp_path / "eval.json"
    text.write_text("\n\n".join(f"Document {i}. {'Ray sees cows. ' * (i % 7 + 3)}" for i in range(60)))
    more = {"held_out": [str(text)], "held_out_windows": ["11"], "held_out_seq_length": ["24"], "output": [str(output)]}
    evaluate({**options, **more, "no_mmlu": [], "which": ["hybrid_ft", "student"]})  # the teacher only says its part
    report = json.loads(output.read_text())["models"]

    windows = read_windows(TextSource(str(text)), models.tokenizer, 11, 24)
    inputs, labels = windows[:, :-1], windows[:, 1:]
    teacher_logits = models.loaded["teacher"](inputs).logits
    vocab = teacher_logits.shape[-1]
    for name in ("student", "hybrid_ft"):
        logits = models.loaded[name](inputs).logits
        assert logits.shape[-1] > vocab
        _, kl, ce = compute_distill_loss(logits, teacher_logits, labels, torch.ones_like(labels), 1.0, 1.0, 1.0)
        same = (logits[..., :vocab].argmax(-1) == teacher_logits.argmax(-1)).float().mean().item()
        assert report[name]["held_out"] == {
            "ce": pytest.approx(ce.item(), abs=1e-4),
            "kl": pytest.approx(kl.item(), abs=1e-4),
            "agreement": pytest.approx(same),
            "perplexity": pytest.approx(ce.exp().item(), rel=1e-4),
            "tokens": 11 * 24,
        }
        assert "acc" not in report[name] and "predictions" not in report[name]
    assert not (tmp_path / "eval.png").exists()


def test_a_task_is_a_piece_like_any_other(models, options, tmp_path, monkeypatch):
    """lm-eval itself is run in test_lm_eval.py."""
    asked = []

    def stand_in(name, model, tokenizer, *settings):
        asked.append((name, model.config.model_type, *settings))
        return {"results": {name: {"acc,none": 0.5}}, "n_shot": {name: 3}, "n_samples": {}, "versions": {}}

    monkeypatch.setattr(pieces, "run_task", stand_in)
    monkeypatch.setattr(checks, "check_tasks", lambda names, local_files_only: None)
    output = tmp_path / "eval.json"
    more = {"tasks": ["arc_easy,gsm8k"], "tasks_num_fewshot": ["3"], "output": [str(output)]}
    evaluate(only(options, "student", "teacher") | more)
    assert sorted(asked) == sorted(
        (task, kind, 4, 512, 3, 3, False) for task in ("arc_easy", "gsm8k") for kind in ("llamba", "llama")
    )
    report = json.loads(output.read_text())["models"]
    assert report["teacher"]["tasks"]["gsm8k"]["results"] == {"gsm8k": {"acc,none": 0.5}}
    assert "| arc_easy | 3 |  | acc,none | 0.5000 | 0.5000 |" in output.with_suffix(".md").read_text()


def test_an_output_is_never_overwritten_in_silence(options, tmp_path):
    output = tmp_path / "eval.json"
    output.write_text("precious")
    options = only(options, "teacher") | {"output": [str(output)]}
    with pytest.raises(ValueError, match="--overwrite"):
        evaluate(options)
    assert output.read_text() == "precious"
    evaluate(options | {"overwrite": []})
    assert json.loads(output.read_text())["n"] == 12


def test_max_length_cuts_prompts(options, tmp_path):
    reports = []
    for length in ("40", "512"):
        evaluate(only(options, "student") | {"max_length": [length], "output": [str(tmp_path / length)]})
        reports.append(json.loads((tmp_path / length).read_text()))
    assert [report["config"]["max_length"] for report in reports] == [40, 512]
    assert reports[0]["predictions"] != reports[1]["predictions"]


def test_a_checkpoint_may_go_once_its_weights_are_read(models, options, tmp_path):
    shutil.copytree(models.root / "ckpt", tmp_path / "ckpt")
    output = tmp_path / "eval.json"
    more = {"which": ["hybrid_ft"], "ckpt": [str(tmp_path / "ckpt")], "output": [str(output)]}
    args = parse_eval_args(command_line({**options, **more}))
    inputs, load_model = check_inputs(args), entry.load_model

    def load_and_delete(*arguments):
        model = load_model(*arguments)
        shutil.rmtree(tmp_path / "ckpt")
        return model

    with pytest.MonkeyPatch.context() as patch, process_groups(inputs.device) as ranks:
        patch.setattr(entry, "load_model", load_and_delete)
        entry.evaluate(args, inputs, ranks)
    assert json.loads(output.read_text())["config"]["layers"] == [0, 2]


def test_the_layers_of_a_preset_do_not_contradict_a_checkpoint(models, options, tmp_path):
    # Without --layers the preset's 14 16 17 30 stand; the checkpoint's own count.
    del options["layers"]
    del options["which"]  # with --ckpt, hybrid_ft
    options |= {"output": [str(tmp_path / "eval.json")]}
    evaluate(options)
    config = json.loads((tmp_path / "eval.json").read_text())["config"]
    assert (config["which"], config["layers"]) == ("hybrid_ft", [0, 2])


def test_the_script_ends_with_one_clear_error(options, tmp_path):
    del options["ckpt"]
    code, printed = fresh.script(command_line(options), entry.main, HF_HUB_OFFLINE="1")
    assert code == 2 and printed.startswith("error: ")
    assert "hybrid_ft: needs --ckpt" in printed and "Traceback" not in printed


@pytest.mark.skipif(not (TINY / "preset.json").is_file(), reason="presets/tiny has no preset.json yet")
def test_the_whole_evaluation_on_the_tiny_preset(tmp_path):
    args = parse_eval_args(["--preset", "tiny"])
    student = AutoModelForCausalLM.from_pretrained(args.student_model)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher_model)
    apply_replacements(student, teacher, args.layers)
    student.save_pretrained(tmp_path / "ckpt")

    output = tmp_path / "eval.json"
    words = "--preset tiny --which all --device cpu --dtype float32 --num_fewshot 1 --limit 5 --local_files_only"
    files = ["--ckpt", str(tmp_path / "ckpt"), "--output", str(output)]
    code, printed = fresh.script([*words.split(), *files], entry.main)
    assert code == 0, printed
    report = json.loads(output.read_text())
    assert report["n"] == 20
    assert report["models"]["hybrid_ft"]["config"]["layers"] == sorted(args.layers)
    scored = report["models"]
    assert scored["hybrid_ft"]["predictions"] == scored["hybrid"]["predictions"]  # a step-0 checkpoint
    assert report["teacher"] > 0.5  # chance is 0.25, and the teacher knows these questions
    assert f"{report['teacher']:.4f}" in printed
