"""Options, models, data and outputs: what an evaluation reads and what it refuses before it loads a model."""

import shutil
from types import SimpleNamespace

import pytest

from arguments import parse_eval_args
from evaluation import checks
from evaluation.checks import check_inputs
from tests.eval_models import TINY, command_line, make_student, options_of, save_models

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
        (
            {"max_length": ["513"], "which": ["teacher"]},
            ["--max_length 513: teacher can read 512", "give --max_length 512"],
        ),
        ({"max_length": ["513"], "which": ["hybrid"]}, ["--max_length 513: hybrid can read 512 tokens"]),
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


def test_a_checkpoint_decides_which_layers_the_untrained_hybrid_has(models, options):
    """Without --layers, the preset's layers would be others, and the two would differ by more than training."""
    del options["layers"]
    inputs = check_inputs(parse_eval_args(command_line(options)))
    assert inputs.sources["hybrid"].layers == inputs.sources["hybrid_ft"].layers == [0, 2]


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
    student = {"which": ["teacher"], "teacher_model": [str(models.root / "with_tokenizer")]}
    shutil.copytree(models.root / "student", models.root / "with_tokenizer")
    models.tokenizer.save_pretrained(models.root / "with_tokenizer")
    assert "--max_length: not given" in error_of_checks({**options, **student})
    inputs = check_inputs(parse_eval_args(command_line({**options, **student, "max_length": ["400"]})))
    assert inputs.max_length == 400


def test_a_student_without_layers_of_a_teacher_reads_prompts_of_any_length(options):
    options = {**options, "which": ["student"], "max_length": ["5000"]}
    assert check_inputs(parse_eval_args(command_line(options))).max_length == 5000


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
    assert check_inputs(parse_eval_args(command_line(options | {"which": ["student"]}))).models == ["student"]
