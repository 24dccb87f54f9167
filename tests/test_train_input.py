"""Bad input to train_gpus.py is one clear error before any weight is read; of several ranks, one reports it."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import distillation.models
import train_gpus
from arguments import parse_train_args
from checkpointing import run_folder
from distillation.models import check_models
from tests import fresh
from tests.model_files import change_json
from tests.small_runs import TOKENIZER, make_models, options
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
        ({"seq_length": 129}, ["--seq_length 129", "128 tokens at once", "lower --seq_length"]),
        ({"dataset_text_field": "body"}, ["--dataset_text_field", "body", "text"]),
        ({"batch_size": 10_000}, ["too small", "--batch_size"]),
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
        ({"warmup_steps": 9000, "max_steps": 10_000}, ["--warmup_steps 9000: the run has", "expected at most"]),
        ({"document_separator": "<|eot_id|>"}, ["--document_separator '<|eot_id|>'", "or '<|endoftext|>'"]),
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


def test_a_quantised_model_is_refused(models, tmp_path, monkeypatch):
    for role in ("teacher", "plain"):
        folder = Path(shutil.copytree(models / role, tmp_path / role))
        change_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    for option, role in (("teacher_model", "teacher"), ("student_model", "plain")):
        message = error_of_run(models, tmp_path, monkeypatch, **{option: tmp_path / role})
        assert f"--{option} {tmp_path / role}: its weights are quantised, by gptq" in message


def test_a_student_of_other_tokens_is_warned_of_at_the_start(models, tmp_path, caplog):
    student = Path(shutil.copytree(models / "plain", tmp_path / "student"))
    args = parse_train_args(options(models, tmp_path / "out", student_model=student))
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, student)
    check_models(args, None)
    assert not caplog.records
    tokens = json.loads((student / "tokenizer.json").read_text())["model"]
    swapped = {**tokens["vocab"], "q": tokens["vocab"]["Q"], "Q": tokens["vocab"]["q"]}
    change_json(student / "tokenizer.json", model={**tokens, "vocab": swapped})
    check_models(args, None)
    assert "2 of its tokens, such as 'Q', have other ids" in caplog.text


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


def test_what_another_rank_refuses_is_in_the_status(models, tmp_path):
    """Rank 0 gets no ValueError: it waits for the other rank in native code, until its lifeline ends the process."""
    codes, text = fresh.ranks(options(models, tmp_path / "out"), 2, arm=refuse_on_rank_1)
    assert codes[0] == 2 and text.count("error: --output_dir: not mine (on rank 1)") == 1 and "Traceback" not in text
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert status == {"status": "refused", "exit_code": 2, "text": "--output_dir: not mine (on rank 1)"}


def refuse_on_rank_1(rank):
    def check_shared(folder, ranks):
        raise ValueError("--output_dir: not mine")

    if rank == 1:
        run_folder.check_shared = check_shared
