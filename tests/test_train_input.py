"""Bad input to train_gpus.py is one clear error before any weight is read; of several ranks, one reports it."""

import sys

import pytest

import distillation.models
import train_gpus
from tests import fresh
from tests.small_runs import make_models, options
from tests.tiny import tiny_student


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def error_of_run(models, tmp_path, monkeypatch, **changes):
    """Returns the error of a run in this process, which must come before any weight is read."""
    for loader in ("get_student_model", "get_teacher_model"):
        monkeypatch.setattr(distillation.models, loader, lambda *a, **k: pytest.fail("a model was loaded"))
    argv = options(models, **{"output_dir": tmp_path / "out", **changes})
    monkeypatch.setattr(sys, "argv", ["train_gpus.py", *argv])
    with pytest.raises(ValueError) as error:
        train_gpus.main()
    return str(error.value)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"layers": "1 9"}, ["--layers 1 9", "out of range", "0 to 3"]),
        ({"dataset_text_field": "body"}, ["--dataset_text_field", "body", "text"]),
        ({"batch_size": 100_000}, ["too small", "--batch_size"]),
        ({"teacher_device": "cuda:3"}, ["--teacher_device cuda:3"]),
        ({"temperature": 0}, ["--temperature 0"]),
        ({"teacher_model": "meta-llama/Absent"}, ["--teacher_model meta-llama/Absent", "hf download"]),
        ({"dataset_split": "validation"}, ["--dataset_split", "validation"]),
        ({"dataset_name": "nowhere.jsonl"}, ["--dataset_name", "nowhere.jsonl"]),
        ({"output_dir": "/proc/nowhere"}, ["--output_dir /proc/nowhere", "cannot be written"]),
        ({"grad_accumulation_steps": 900, "save_interval": 900}, ["--grad_accumulation_steps 900", "micro steps"]),
        ({"log_file": "/proc/nowhere/log"}, ["--log_file /proc/nowhere/log", "cannot be written"]),
        ({"teacher_device": "meta"}, ["--teacher_device meta", "expected cpu"]),
        ({"gradient_checkpointing": True, "checkpoint_blocks": 5}, ["--checkpoint_blocks 5", "has 4"]),
        ({"resume_step": 600}, ["--resume_step 600", "nothing is left"]),
        ({"save_interval": 3, "grad_accumulation_steps": 2}, ["--save_interval 3", "--grad_accumulation_steps 2"]),
        ({"eval_interval": 2}, ["--eval_interval 2", "is trained on", "--eval_dataset_name"]),
        ({"eval_windows": -1}, ["--eval_windows -1"]),
        ({"eval_interval": 2, "eval_dataset_name": "nowhere.jsonl"}, ["--eval_dataset_name 'nowhere.jsonl'"]),
    ],
)
def test_bad_input_is_one_clear_error_before_a_model_is_loaded(models, tmp_path, monkeypatch, changes, words):
    message = error_of_run(models, tmp_path, monkeypatch, **changes)
    for word in words:
        assert word in message


def test_a_tokenizer_that_is_too_large_for_the_student(models, tmp_path, monkeypatch):
    tiny_student(vocab_size=96).save_pretrained(tmp_path / "small")
    message = error_of_run(models, tmp_path, monkeypatch, student_model=tmp_path / "small")
    assert "--student_model" in message and "96" in message


def test_an_output_directory_with_results_is_left_alone(models, tmp_path, monkeypatch):
    (tmp_path / "out" / "checkpoint-30").mkdir(parents=True)
    assert "checkpoint-30" in error_of_run(models, tmp_path, monkeypatch)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-30", ".lock"}
    assert list((tmp_path / "out" / "checkpoint-30").iterdir()) == []


def test_of_two_ranks_one_reports_and_the_exit_code_is_not_zero(models, tmp_path):
    codes, text = fresh.ranks(options(models, tmp_path / "out", layers="1 9"), 2)
    assert codes[0] == 2 and codes[1] != 0
    assert text.count("error: --layers 1 9") == 1
    assert "Traceback" not in text
