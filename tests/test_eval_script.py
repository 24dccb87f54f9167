"""The evaluation entry: run whole on small models made here and on the tiny preset, and given bad options."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import eval_mmlu_hybrid as entry
from arguments import parse_eval_args
from distillation.losses import compute_distill_loss
from evaluation import checks, mmlu, pieces, statistics
from evaluation.checks import check
from evaluation.held_out import read_windows
from evaluation.pieces import Piece
from llamba import LlambaConfig, LlambaForCausalLM, attention_cfg_from
from model_utils import apply_replacements
from processes.ranks import process_groups
from tests import fresh
from tests.tiny import tiny_teacher
from text.sources import TextSource

ROOT = Path(__file__).parents[1]
TINY = ROOT / "presets" / "tiny"
HELD_OUT = TINY / "text" / "heldout.jsonl"
WHICH = ["student", "hybrid", "hybrid_ft", "teacher"]
LAYERS = ["0", "2"]


def make_student(vocab_size: int, **hybrid) -> LlambaForCausalLM:
    config = LlambaConfig(
        vocab_size=vocab_size,
        pad_vocab_size_multiple=100,
        d_model=32,
        n_layer=3,
        mlp_cfg={"intermediate_size": 64},
        ssm_cfg={"d_state": 8, "n_v_heads": 4, "n_qk_heads": 2, "chunk_size": 16},
        initializer_range=0.2,
        **hybrid,
    )
    return LlambaForCausalLM(config).eval()


def make_teacher(vocab_size: int) -> LlamaForCausalLM:
    return tiny_teacher(vocab_size=vocab_size, num_hidden_layers=3, max_position_embeddings=512, initializer_range=0.2)


def make_hybrid(student: LlambaForCausalLM, teacher: LlamaForCausalLM) -> LlambaForCausalLM:
    """Put together weight by weight, rather than by the function that the entry uses."""
    hybrid = make_student(
        student.config.vocab_size,
        attention_layers=[int(layer) for layer in LAYERS],
        attention_cfg=attention_cfg_from(teacher.config),
    )
    weights = student.state_dict()
    for layer in LAYERS:
        prefix = f"backbone.layers.{layer}."
        weights = {name: weight for name, weight in weights.items() if not name.startswith(prefix)}
        given = teacher.model.layers[int(layer)].state_dict()
        weights |= {prefix + name: weight for name, weight in given.items()}
    hybrid.load_state_dict(weights)
    return hybrid


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> SimpleNamespace:
    """A teacher, a student and a "trained" hybrid with random weights, loaded and on disk."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "teacher")
    torch.manual_seed(0)
    teacher, student = make_teacher(len(tokenizer)), make_student(len(tokenizer))
    hybrid, trained = make_hybrid(student, teacher), make_hybrid(student, teacher)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    for name, model in {"teacher": teacher, "student": student, "ckpt": trained}.items():
        model.save_pretrained(root / name)
    tokenizer.save_pretrained(root / "teacher")
    loaded = {"student": student, "hybrid": hybrid, "hybrid_ft": trained, "teacher": teacher}
    return SimpleNamespace(root=root, tokenizer=tokenizer, loaded=loaded)


@pytest.fixture
def options(models):
    """Options of a correct call, which a test changes at one place."""
    return {
        "teacher_model": [str(models.root / "teacher")],
        "student_model": [str(models.root / "student")],
        "ckpt": [str(models.root / "ckpt")],
        "layers": LAYERS,
        "dtype": ["float32"],
        "device": ["cpu"],
        "mmlu_dir": [str(TINY / "mmlu")],
        "num_fewshot": ["2"],
        "limit": ["3"],
        "batch_size": ["4"],
        "which": WHICH,
    }


def command_line(options: dict[str, list[str]]) -> list[str]:
    return [word for name, values in options.items() for word in (f"--{name}", *values)]


def evaluate(options: dict[str, list[str]]) -> None:
    args = parse_eval_args(command_line(options))
    plan = check(args)
    with process_groups(plan.device) as ranks:
        entry.run(args, plan, ranks)


def error_of(options: dict[str, list[str]]) -> str:
    """The message of a call that has to end before any model is loaded: nothing but checks runs here."""
    with pytest.raises(ValueError) as caught:
        check(parse_eval_args(command_line(options)))
    return str(caught.value)


def test_four_models_are_scored_each_as_itself(models, options, tmp_path, capsys):
    output = tmp_path / "new" / "eval.json"
    evaluate(options | {"output": [str(output)]})
    report = json.loads(output.read_text())

    questions = mmlu.build_questions(mmlu.load_mmlu(TINY / "mmlu"), num_fewshot=2, limit=3)
    assert report["n"] == len(questions) == 12
    assert list(report["models"]) == WHICH
    for name in WHICH:
        result = report["models"][name]
        expected = mmlu.score(models.loaded[name], models.tokenizer, questions, 1, torch.device("cpu"), None)
        for question, got, wanted in zip(questions, result["predictions"], expected, strict=True):
            assert (got["subject"], got["index"]) == (question.subject, question.index)
            assert (got["answer"], got["prediction"]) == (question.answer, wanted.prediction)
            assert got["log_likelihoods"] == pytest.approx(wanted.log_likelihoods, abs=1e-4)
        counts = statistics.aggregate(expected)
        assert {key: result[key] for key in counts} == counts
        assert report[name] == counts["acc"]
    likelihoods = [str(report["models"][name]["predictions"][0]["log_likelihoods"]) for name in WHICH]
    assert len(set(likelihoods)) == 4

    configs = [report["models"][name]["config"] for name in WHICH]
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
    assert table[0].split() == ["subject", "n", *WHICH]
    assert [line.split()[0] for line in table[1:]] == [
        "animals",
        "colours",
        "meals",
        "tools",
        "all",
        "stderr",
    ]
    assert table[5].split() == ["all", "12", *(f"{report[name]:.4f}" for name in WHICH)]


def test_one_model_is_reported_flat(options, tmp_path):
    output = tmp_path / "eval.json"
    options |= {"which": ["student"], "subjects": ["tools"], "output": [str(output)]}
    del options["ckpt"]
    evaluate(options)
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
    more = {"tasks": ["arc_easy,gsm8k"], "tasks_num_fewshot": ["3"], "which": ["student", "teacher"]}
    evaluate({**options, **more, "output": [str(output)]})
    assert sorted(asked) == sorted(
        (task, kind, 4, 512, 3, 3, False) for task in ("arc_easy", "gsm8k") for kind in ("llamba", "llama")
    )
    report = json.loads(output.read_text())["models"]
    assert report["teacher"]["tasks"]["gsm8k"]["results"] == {"gsm8k": {"acc,none": 0.5}}
    assert "| arc_easy | 3 |  | acc,none | 0.5000 | 0.5000 |" in output.with_suffix(".md").read_text()


def test_without_a_terminal_a_line_tells_how_far_it_is(monkeypatch, caplog):
    monkeypatch.setattr(entry, "QUIET_S", -1.0)
    caplog.set_level("INFO", logger="train")
    progress = entry.Progress(100, is_main=True)
    progress.began -= 60
    progress.advance("teacher", Piece("mmlu-tools", 25, lambda scorer: None))
    progress.close()
    assert caplog.messages == ["teacher: 25%, about 3 min left"]
    quiet = entry.Progress(100, is_main=False)
    quiet.advance("teacher", Piece("mmlu-tools", 25, lambda scorer: None))
    assert len(caplog.messages) == 1


def test_a_terminal_shows_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = entry.Progress(100, is_main=True)
    progress.advance("teacher", Piece("mmlu-tools", 25, lambda scorer: None))
    progress.bar.refresh()
    progress.close()
    assert "teacher mmlu-tools  25%|" in capsys.readouterr().err


def test_max_length_cuts_prompts(options, tmp_path):
    reports = []
    for length in ("40", "512"):
        options |= {"which": ["student"], "max_length": [length], "output": [str(tmp_path / length)]}
        evaluate(options)
        reports.append(json.loads((tmp_path / length).read_text()))
    assert [report["config"]["max_length"] for report in reports] == [40, 512]
    assert reports[0]["predictions"] != reports[1]["predictions"]


def test_an_output_is_never_overwritten_in_silence(options, tmp_path):
    output = tmp_path / "eval.json"
    output.write_text("precious")
    options |= {"output": [str(output)], "which": ["teacher"]}
    assert "--overwrite" in error_of(options)
    assert output.read_text() == "precious"
    evaluate(options | {"overwrite": []})
    assert json.loads(output.read_text())["n"] == 12


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"mmlu_dir": ["nowhere"]}, ["--mmlu_dir nowhere", "is not a folder", "dev/<subject>_dev.csv"]),
        ({"mmlu_dir": None, "local_files_only": []}, ["--mmlu_dir: not given", "hf download cais/mmlu"]),
        ({"subjects": ["toolz"]}, ["--subjects toolz", "did you mean tools?"]),
        ({"num_fewshot": ["7"]}, ["--num_fewshot 7", "0 to 5"]),
        ({"ckpt": None}, ["hybrid_ft", "--ckpt"]),
        ({"ckpt": ["nowhere"]}, ["--ckpt nowhere: not a directory"]),
        ({"ckpt": [str(TINY / "text")]}, ["--ckpt", "no config.json"]),
        ({"layers": ["1"]}, ["--layers 1: --ckpt", "[0, 2]"]),
        ({"layers": ["0", "9"], "which": ["hybrid"]}, ["--layers 0 9", "[9] out of range"]),
        ({"teacher_model": [str(TINY / "text")]}, ["--teacher_model", "no config.json"]),
        ({"student_model": [str(TINY / "text")]}, ["--student_model", "no config.json"]),
        ({"output": [str(TINY)]}, ["--output", "is a directory"]),
        ({"output": ["report.md"]}, ["--output report.md", "its report gets .md"]),
        ({"output": ["."]}, ["--output .", "expected the name of a JSON file"]),
        ({"output": ["x" * 300]}, ["--output xxx", "cannot be written (File name too long)"]),
        ({"held_out": [__file__], "held_out_seq_length": ["64"]}, ["--held_out", "unsupported file ending"]),
        (
            {"held_out": [str(HELD_OUT)], "held_out_seq_length": ["64"], "held_out_text_field": ["body"]},
            ["--held_out_text_field"],
        ),
        (
            {"held_out": [str(HELD_OUT)], "held_out_seq_length": ["513"]},
            ["--held_out_seq_length 513: expected at most 512"],
        ),
        ({"output": [f"{__file__}/eval.json"]}, ["--output", "cannot write below"]),
        ({"device": ["tpu:0"]}, ["--device tpu:0"]),
        (
            {"mmlu_dir": ["nowhere"], "ckpt": ["lost"], "output": [str(TINY)]},
            ["--mmlu_dir nowhere", "--ckpt lost", "--output"],
        ),
    ],
)
def test_bad_options_are_reported_before_a_model_is_loaded(change, expected, options):
    options = {name: values for name, values in (options | change).items() if values is not None}
    message = error_of(options)
    for part in expected:
        assert part in message


def test_a_checkpoint_says_which_layers_the_untrained_hybrid_has(models, options):
    """Without --layers, the preset's would be other ones, and training would not be all that the two differ by."""
    del options["layers"]
    plan = check(parse_eval_args(command_line(options)))
    assert plan.sources["hybrid"].layers == plan.sources["hybrid_ft"].layers == [0, 2]


def test_a_link_is_followed_once(models, options, tmp_path):
    """While training goes on, `latest` may have moved by the time the weights are read."""
    latest = tmp_path / "latest"
    latest.symlink_to(models.root / "ckpt")
    plan = check(parse_eval_args(command_line({**options, "ckpt": [str(latest)]})))
    assert plan.sources["hybrid_ft"].path == str(models.root / "ckpt")


def test_a_checkpoint_may_go_once_its_weights_are_read(models, options, tmp_path):
    shutil.copytree(models.root / "ckpt", tmp_path / "ckpt")
    output = tmp_path / "eval.json"
    more = {"which": ["hybrid_ft"], "ckpt": [str(tmp_path / "ckpt")], "output": [str(output)]}
    args = parse_eval_args(command_line({**options, **more}))
    plan, load = check(args), entry.load

    def load_and_delete(*inputs):
        model = load(*inputs)
        shutil.rmtree(tmp_path / "ckpt")
        return model

    with pytest.MonkeyPatch.context() as patch, process_groups(plan.device) as ranks:
        patch.setattr(entry, "load", load_and_delete)
        entry.run(args, plan, ranks)
    assert json.loads(output.read_text())["config"]["layers"] == [0, 2]


def test_a_tokenizer_that_is_none_of_the_students(models, options, tmp_path):
    make_student(len(models.tokenizer) - 200).save_pretrained(tmp_path)
    assert "--student_model has a vocabulary of 900" in error_of({**options, "student_model": [str(tmp_path)]})


def test_a_teacher_that_does_not_tell_its_context(models, options):
    """A Llamba has no positions to run out of."""
    student = {"which": ["teacher"], "teacher_model": [str(models.root / "with_tokenizer")]}
    shutil.copytree(models.root / "student", models.root / "with_tokenizer")
    models.tokenizer.save_pretrained(models.root / "with_tokenizer")
    assert "--max_length: not given" in error_of({**options, **student})
    plan = check(parse_eval_args(command_line({**options, **student, "max_length": ["400"]})))
    assert plan.max_length == 400


def test_ranks_that_see_different_questions_are_told(options):
    class Ranks:
        def all_have(self, content):
            seen.append(content)
            return False

    seen: list[bytes] = []
    for limit in ("3", "2"):
        plan = check(parse_eval_args(command_line({**options, "limit": [limit]})))
        with pytest.raises(ValueError, match="the ranks have not found the same"):
            checks.check_agreement(plan, Ranks())
    assert seen[0] != seen[1]


def test_a_llama_is_no_student_and_no_checkpoint(models, options):
    llama = [str(models.root / "teacher")]
    message = error_of(options | {"student_model": llama, "ckpt": llama})
    assert f"--student_model {llama[0]}: " in message and f"--ckpt {llama[0]}: " in message
    assert message.count("expected 'llamba'") == 2


def test_a_teacher_without_tokenizer_is_named(models, options, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(models.root / "teacher", bare, ignore=shutil.ignore_patterns("tokenizer*"))
    message = error_of(options | {"teacher_model": [str(bare)]})
    assert f"--teacher_model {bare}: cannot read its tokenizer" in message


def test_the_layers_of_a_preset_do_not_contradict_a_checkpoint(models, options, tmp_path):
    # Without --layers the preset's 14 16 17 30 stand; the checkpoint's own count.
    del options["layers"]
    options |= {"which": ["hybrid_ft"], "output": [str(tmp_path / "eval.json")]}
    evaluate(options)
    assert json.loads((tmp_path / "eval.json").read_text())["config"]["layers"] == [0, 2]


def test_a_hybrid_is_no_student_to_make_a_hybrid_of(options):
    options |= {"student_model": options["ckpt"]}
    assert "--which hybrid: --student_model" in error_of(options)
    assert check(parse_eval_args(command_line(options | {"which": ["student"]}))).models == ["student"]


def test_the_script_ends_with_one_clear_error(options, tmp_path):
    del options["ckpt"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "eval_mmlu_hybrid.py"), *command_line(options)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert "hybrid_ft: needs --ckpt" in result.stderr and "Traceback" not in result.stderr


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
