"""Options, models, data and outputs: what an evaluation reads and what it refuses before it loads a model."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from arguments import parse_eval_args
from evaluation import checks
from evaluation.checks import check_inputs
from evaluation.models import load_model
from tests.eval_models import TINY, command_line, make_student, only, options_of, save_models
from tests.model_files import change_json

HELD_OUT = TINY / "text" / "heldout.jsonl"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> SimpleNamespace:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def options(models) -> dict[str, list[str]]:
    return options_of(models.root)


def error_of_checks(options: dict[str, list[str]]) -> str:
    """Returns the message of a call that has to fail before any model is loaded: only the checks run here."""
    with pytest.raises(ValueError) as caught:
        check_inputs(parse_eval_args(command_line(options)))
    return str(caught.value)


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
        ({"layers": ["1"]}, ["--layers 1: --ckpt", "was trained with --layers 0 2;"]),
        ({"layers": ["0", "9"], "which": ["hybrid"], "ckpt": None}, ["--layers 0 9", "[9] out of range"]),
        ({"teacher_model": [str(TINY / "text")]}, ["--teacher_model", "no config.json"]),
        ({"student_model": [str(TINY / "text")]}, ["--student_model", "no config.json"]),
        (
            {"max_length": ["513"]},
            ["--max_length 513 (too long): the hybrid's layers of the teacher can read 512 tokens"],
        ),
        ({"max_length": ["15"]}, ["--max_length 15: nothing of a question is left", "at least 16, or --no_mmlu"]),
        ({"max_length": ["1"], "no_mmlu": [], "tasks": ["hellaswag"]}, ["--max_length 1: nothing", "or no --tasks"]),
        (
            {"max_length": ["513"], "which": ["hybrid_ft"]},
            ["--max_length 513 (too long): the layers that hybrid_ft has from a teacher can read 512 tokens"],
        ),
        (
            {"retrieval": [], "retrieval_lengths": ["513", "4096"]},
            ["--retrieval_lengths 513 4096: expected at most 512"],
        ),
        ({"retrieval": [], "retrieval_lengths": ["2"]}, ["--retrieval_lengths 2: 4 pairs and a question take more"]),
        ({"output": [str(TINY)]}, ["--output", "is a directory"]),
        ({"output": ["report.md"]}, ["--output report.md", "its report gets .md"]),
        ({"output": ["."]}, ["--output .", "expected the name of a JSON file"]),
        ({"output": ["x" * 252]}, ["--output xxx", "cannot be written (File name too long)"]),
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
    message = error_of_checks(options)
    for part in expected:
        assert part in message


def test_a_student_that_waits_for_heads_is_not_scored_without_a_word(models, options, tmp_path, caplog):
    shutil.copytree(models.root / "student", tmp_path / "student")
    change_json(tmp_path / "student" / "config.json", fitted_beside={"1": [0, 2]})
    options |= {"student_model": [str(tmp_path / "student")]}
    check_inputs(parse_eval_args(command_line(only(options, "student"))))
    [warned] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned.startswith("--which student: its mixers were fitted beside heads") and warned.endswith("1:0,1:2")
    caplog.clear()
    heads = {"layers": ["-1"], "heads": ["1:0,1:2"]}
    check_inputs(parse_eval_args(command_line(only(options | heads, "hybrid"))))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("trained_on", "words"),
    [
        ({"dataset_name": str(HELD_OUT)}, "all of it is trained on by the run of --ckpt"),
        ({"dataset_name": str(HELD_OUT), "dataset_split": "train[:9]"}, "its rows 0 to 8 of split 'train'"),
        ({"dataset_name": "folder"}, "1 file(s) of it, for example"),
        ({"dataset_name": str(HELD_OUT), "dataset_split": "train[9:]"}, None),
        ({"dataset_name": "lost/on/this/machine.jsonl"}, None),
        ({"dataset_name": None}, None),
        ({"dataset_name": "~/b.jsonl"}, "all of it is trained on by the run of --ckpt"),
    ],
)
def test_held_out_text_that_the_checkpoint_was_trained_on(
    models, options, trained_on, words, tmp_path, own_cache, monkeypatch, caplog
):
    checkpoint = Path(shutil.copytree(options["ckpt"][0], tmp_path / "checkpoint-1"))
    kept = {"dataset_subset": None, "dataset_split": "train", "dataset_revision": None, "dataset_text_field": "text"}
    kept |= {"dataset_streaming": False, **trained_on}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "folder"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.jsonl").symlink_to(HELD_OUT)
    (tmp_path / "folder" / "a.jsonl").write_text('{"text": "a"}')
    (checkpoint / "training_state.json").write_text(json.dumps({"arguments": kept}))
    options |= {"ckpt": [str(checkpoint)], "which": ["hybrid_ft"], "held_out": [str(HELD_OUT)]}
    options |= {"held_out_seq_length": ["64"], "held_out_split": ["train[:9]"]}
    if words is None:
        assert check_inputs(parse_eval_args(command_line(options))).windows is not None
        is_known = trained_on.get("dataset_name") == str(HELD_OUT)
        assert [record.levelname for record in caplog.records if "is not known" in record.message] == (
            [] if is_known else ["WARNING"]
        )
    else:
        assert words in error_of_checks(options)


def test_a_checkpoint_decides_which_layers_the_untrained_hybrid_has(models, options):
    """Without --layers, the preset's layers would be others, and the two would differ by more than training."""
    del options["layers"]
    inputs = check_inputs(parse_eval_args(command_line(options)))
    assert inputs.sources["hybrid"].layers == inputs.sources["hybrid_ft"].layers == [0, 2]


def test_a_layer_of_which_all_heads_are_named_is_a_whole_one_in_the_results(options):
    options = only(options, "hybrid") | {"layers": ["2"], "heads": ["0:0,0:1,0:2,0:3"]}
    hybrid = check_inputs(parse_eval_args(command_line(options))).sources["hybrid"]
    assert (hybrid.layers, hybrid.heads) == ([0, 2], {})


def test_a_hybrid_of_another_teacher_than_the_checkpoints_is_not_compared_with_it(models, options, tmp_path):
    teacher = shutil.copytree(models.root / "teacher", tmp_path / "teacher")
    change_json(teacher / "config.json", rms_norm_eps=0.25)
    message = error_of_checks(options | {"teacher_model": [str(teacher)]})
    assert "--which hybrid: --ckpt has layers or heads of another teacher, of which rms_norm_eps is 1e-06" in message
    check_inputs(parse_eval_args(command_line(options | {"which": ["hybrid_ft"], "teacher_model": [str(teacher)]})))


def test_a_link_is_followed_once(models, options, tmp_path):
    """During training, `latest` may have moved by the time the weights are read."""
    latest = tmp_path / "latest"
    latest.symlink_to(models.root / "ckpt")
    inputs = check_inputs(parse_eval_args(command_line({**options, "ckpt": [str(latest)]})))
    assert inputs.sources["hybrid_ft"].path == str(models.root / "ckpt")


def test_a_tokenizer_that_does_not_match_the_student(models, options, tmp_path):
    make_student(len(models.tokenizer) - 200).save_pretrained(tmp_path)
    assert "--student_model has a vocabulary of 900" in error_of_checks({**options, "student_model": [str(tmp_path)]})


def test_a_teacher_whose_config_does_not_say_its_context(models, options):
    """A Llamba has no positions to run out of."""
    options = only(options, "teacher") | {"teacher_model": [str(models.root / "with_tokenizer")]}
    shutil.copytree(models.root / "student", models.root / "with_tokenizer")
    models.tokenizer.save_pretrained(models.root / "with_tokenizer")
    assert "--max_length: not given" in error_of_checks(options)
    inputs = check_inputs(parse_eval_args(command_line({**options, "max_length": ["400"]})))
    assert inputs.max_length == 400


def test_a_student_without_layers_of_a_teacher_reads_any_length(options):
    """Its held-out windows are no longer than the teacher's context, because the teacher reads them too."""
    options = only(options, "student") | {"max_length": ["2000"]}
    assert check_inputs(parse_eval_args(command_line(options))).max_length == 2000
    options |= {"held_out": [str(HELD_OUT)], "held_out_seq_length": ["513"]}
    assert "--held_out_seq_length 513: expected at most 512" in error_of_checks(options)


def test_held_out_windows_that_do_not_fit_into_memory(options, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=100_000))
    options |= {"held_out": [str(HELD_OUT)], "held_out_seq_length": ["64"], "held_out_windows": ["20"]}
    assert "--held_out_windows 20: the teacher's hidden states of 20 windows take" in error_of_checks(options)
    assert "give at most 6" in error_of_checks(options)  # half of the memory, 64 * 32 * 4 bytes a window


def test_a_model_that_changes_after_the_checks_is_not_scored(models, options, tmp_path):
    shutil.copytree(models.root / "ckpt", tmp_path / "ckpt")
    args = parse_eval_args(command_line({**options, "ckpt": [str(tmp_path / "ckpt")]}))
    inputs = check_inputs(args)
    assert load_model("hybrid_ft", args, inputs)
    os.utime(tmp_path / "ckpt" / "config.json", ns=(1, 1))
    with pytest.raises(ValueError, match="the hybrid_ft, .*ckpt, was deleted or written anew"):
        load_model("hybrid_ft", args, inputs)


def test_an_untrained_hybrid_whose_teacher_changes_after_the_checks_is_not_scored(models, options, tmp_path):
    shutil.copytree(models.root / "teacher", tmp_path / "teacher")
    args = parse_eval_args(command_line(only(options, "hybrid") | {"teacher_model": [str(tmp_path / "teacher")]}))
    inputs = check_inputs(args)
    os.utime(tmp_path / "teacher" / "config.json", ns=(1, 1))
    with pytest.raises(ValueError, match="the teacher, .*teacher, was deleted or written anew"):
        load_model("hybrid", args, inputs)


def test_options_of_a_part_that_is_not_measured_are_logged(options, caplog):
    caplog.set_level("INFO", logger="train")
    options |= {"retrieval_lengths": ["64"]}
    for more, n in ({}, 1), ({"no_retrieval": []}, 0), ({"retrieval": []}, 0):
        caplog.clear()
        check_inputs(parse_eval_args(command_line(options | more)))
        assert caplog.text.count("--retrieval_lengths: without effect, because --retrieval is not given") == n


def test_ranks_that_read_different_questions_are_an_error(options):
    class Ranks:
        def all_have(self, content):
            seen.append(content)
            return False

    seen: list[bytes] = []
    for limit in ("3", "2"):
        inputs = check_inputs(parse_eval_args(command_line({**options, "limit": [limit]})))
        with pytest.raises(ValueError, match="the ranks have not found the same"):
            checks.check_agreement(inputs, Ranks())
    assert seen[0] != seen[1]


def test_a_llama_is_no_student_and_no_checkpoint(models, options):
    llama = [str(models.root / "teacher")]
    message = error_of_checks(options | {"student_model": llama, "ckpt": llama})
    assert f"--student_model {llama[0]}: " in message and f"--ckpt {llama[0]}: " in message
    assert message.count("expected 'llamba'") == 2


def test_a_teacher_without_tokenizer_is_named(models, options, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(models.root / "teacher", bare, ignore=shutil.ignore_patterns("tokenizer*"))
    message = error_of_checks(options | {"teacher_model": [str(bare)]})
    assert f"--teacher_model {bare}: cannot read its tokenizer" in message


def test_a_hybrid_is_no_student_to_make_a_hybrid_of(options):
    options |= {"student_model": options["ckpt"]}
    assert "--which hybrid: --student_model" in error_of_checks(options)
    assert check_inputs(parse_eval_args(command_line(only(options, "student")))).models == ["student"]
