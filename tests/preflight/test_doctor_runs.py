"""What doctor.py says of a run: its models, tokens, loss, text, disk and charts, as they should be and spoilt."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

import preflight.checks.loss
import preflight.checks.models
import preflight.checks.storage
import preflight.checks.text
from checkpointing.files import STATE_FILE, SUMS_FILE, checkpoint_bytes, data_file, optimizer_file
from checkpointing.state import FORMAT
from distillation.fused_loss import fused_distill_loss
from preflight.checks.basics import FAILURE, OK, WARNING, Case, run_check
from tests.preflight.test_doctor import TINY, case, found, statuses, the_bad_one
from utils import lock_dir


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a model of the tiny preset, to be spoilt."""

    def make(role):
        return Path(shutil.copytree(TINY / role, tmp_path / role))

    return make


def change_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --- models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_shard_is_missing(copy_of, role):
    folder = copy_of(role)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    bad = the_bad_one(found(preflight.checks.models.check_models, f"--{role}_model", folder))
    assert "model-00002-of-00002.safetensors" in bad.found and bad.remedy == "copy them again"
    if role == "teacher":
        again = the_bad_one(found(preflight.checks.loss.check_equal_models, f"--{role}_model", folder), WARNING)
        assert again.found == "not looked at: the teacher is not whole on this disk, see above"


def test_names_of_the_hub_that_are_not_here(monkeypatch, tmp_path):
    monkeypatch.setattr("model_utils.snapshot_download", lambda *_, **__: raise_(OSError("not cached")))
    teacher, student = found(preflight.checks.models.check_models, preset="llamba-8b")
    assert statuses([teacher, student]) == [WARNING, WARNING]
    assert "download it (16 GB)" in teacher.found and "(17 GB)" in student.found
    assert teacher.remedy.startswith("hf download meta-llama/Llama-3.1-8B-Instruct")
    findings = found(preflight.checks.models.check_models, "--local_files_only", preset="llamba-8b")
    assert statuses(findings) == [FAILURE, FAILURE]


def raise_(error):
    raise error


def test_a_student_that_is_none(copy_of):
    bad = the_bad_one(found(preflight.checks.models.check_models, "--student_model", copy_of("teacher")))
    assert "model_type 'llama'" in bad.found


def test_models_that_do_not_go_together(copy_of, tmp_path):
    interval = ("--layer_map_interval", 5)
    bad = the_bad_one(found(preflight.checks.models.check_configs, "--layers", 1, 9))
    assert "[9] out of range" in bad.found
    bad = the_bad_one(found(preflight.checks.storage.check_disk, "--layers", 1, 9), WARNING)
    assert bad.found == "not looked at: teacher and student do not go together, see above"
    bad = the_bad_one(
        found(preflight.checks.models.check_configs, "--gradient_checkpointing", "--checkpoint_blocks", 9)
    )
    assert "--checkpoint_blocks 9" in bad.found
    change_json(copy_of("teacher") / "config.json", num_hidden_layers=5)
    teacher = ("--teacher_model", tmp_path / "teacher")
    assert "the teacher 5 of" in the_bad_one(found(preflight.checks.models.check_configs, *teacher, *interval)).found
    assert statuses(found(preflight.checks.models.check_configs, *teacher)) == [OK]
    (well,) = found(preflight.checks.models.check_configs, *interval)
    assert well.status == OK and "[1, 2, 3]" in well.found


def test_a_checkpoint_that_is_none(tmp_path):
    assert (
        "starts at 0"
        in found(preflight.checks.models.check_resume, "--resume", "auto", "--output_dir", tmp_path)[0].found
    )
    (tmp_path / "checkpoint-5").mkdir()
    findings = found(preflight.checks.models.check_resume, "--resume", "auto", "--output_dir", tmp_path)
    assert findings[0].status == FAILURE and "no good checkpoint" in findings[0].found
    (tmp_path / "checkpoint-5" / "training_state.json").write_text("{}")
    both = case("--resume", "auto", "--output_dir", tmp_path)
    told = [
        run_check("name", check, both)
        for check in (preflight.checks.models.check_resume, preflight.checks.models.check_models)
    ]
    assert statuses(told[0]) == [FAILURE, WARNING] and statuses(told[1]) == [OK, OK], "a bad checkpoint is told once"


def checkpoint_of(folder, micro_step, *options):
    """What the quick check looks at, of a run on this machine."""
    checkpoint = Path(shutil.copytree(TINY / "student", folder / f"checkpoint-{micro_step}"))
    arguments = dataclasses.asdict(case(*options).args) | {"teacher_prefetch": 0}
    state = {"format": FORMAT, "world_size": 1, "arguments": arguments}
    (checkpoint / STATE_FILE).write_text(json.dumps(state))
    (checkpoint / data_file(0, 1)).write_text("{}")
    save_file({}, checkpoint / optimizer_file(0, 1))
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in checkpoint.iterdir()]
    (checkpoint / SUMS_FILE).write_text("\n".join(lines))
    return checkpoint


def test_a_run_that_goes_on_as_it_was_is_no_other(tmp_path):
    """Not even where an option is left for the run to choose."""
    options = ("--output_dir", tmp_path, "--resume", "auto")
    checkpoint_of(tmp_path, 6, *options)
    (well,) = found(preflight.checks.models.check_resume, *options)
    assert well.status == OK and "checkpoint-6" in well.found
    changed = the_bad_one(found(preflight.checks.models.check_resume, *options, "--teacher_prefetch", 1), WARNING)
    assert "goes on with --teacher_prefetch 1 where it had 0" in changed.found


# --- tokens --------------------------------------------------------------------------------------------------


def test_a_vocabulary_that_is_too_small(copy_of):
    folder = copy_of("student")
    change_json(folder / "config.json", vocab_size=1000)
    findings = found(preflight.checks.models.check_tokens, "--student_model", folder)
    bad = the_bad_one(findings)
    assert "--student_model has a vocabulary of 1000" in bad.found and "24 token(s) beyond it" in bad.found
    assert any("1000 entries are shared; the loss leaves out the others" in finding.found for finding in findings)


def test_a_student_with_other_tokens(copy_of):
    folder = copy_of("student")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    change = {"model": {**tokenizer["model"], "vocab": {**vocab, "q": vocab["Q"], "Q": vocab["q"]}}}
    change_json(folder / "tokenizer.json", **change)
    bad = the_bad_one(found(preflight.checks.models.check_tokens, "--student_model", folder))
    assert bad.name == "student's tokenizer" and "2 of its tokens, such as 'Q', have other ids" in bad.found
    fewer_merges = {**tokenizer["model"], "merges": tokenizer["model"]["merges"][:100]}
    change_json(folder / "tokenizer.json", model=fewer_merges)
    bad = the_bad_one(found(preflight.checks.models.check_tokens, "--student_model", folder))
    assert bad.name == "student's tokenizer" and "cuts a probe into other tokens" in bad.found
    for file in folder.glob("tokenizer*"):
        file.unlink()
    findings = found(preflight.checks.models.check_tokens, "--student_model", folder)
    assert set(statuses(findings)) == {OK} and "none of its own" in findings[-1].found


def test_a_tokenizer_without_an_end(copy_of):
    folder = copy_of("teacher")
    change_json(folder / "tokenizer_config.json", eos_token=None)
    assert (
        "has no eos_token" in the_bad_one(found(preflight.checks.models.check_tokens, "--teacher_model", folder)).found
    )


def test_special_tokens_of_another_model(copy_of):
    teacher, student = copy_of("teacher"), copy_of("student")
    change_json(teacher / "config.json", bos_token_id=5)
    bad = the_bad_one(found(preflight.checks.models.check_special_tokens, "--teacher_model", teacher))
    assert bad.name == "teacher's bos_token_id" and bad.found == "5 in config.json, 0 in the tokenizer"
    change_json(student / "config.json", eos_token_id=7)
    bad = the_bad_one(found(preflight.checks.models.check_special_tokens, "--student_model", student), WARNING)
    assert bad.name == "student's eos_token_id"
    change_json(student / "config.json", bos_token_id=None, eos_token_id=[3, 0])
    findings = found(preflight.checks.models.check_special_tokens, "--student_model", student)
    assert set(statuses(findings)) == {OK}


def test_the_probe_has_every_script():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "teacher")
    assert tokenizer.decode(tokenizer(preflight.checks.models.PROBE)["input_ids"]) == preflight.checks.models.PROBE
    assert all(part in preflight.checks.models.PROBE for part in ("fox", "def f(x)", "模型", "🚀", "1234567890"))


# --- the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal,dtype", [("hidden", "float32"), ("logits", "float32"), ("hidden", "bfloat16")])
def test_equal_models_have_no_loss(signal, dtype):
    options = ("--teacher_signal", signal, "--dtype", dtype, "--temperature", 2)
    for check in (preflight.checks.loss.check_loss, preflight.checks.loss.check_equal_models):
        (finding,) = found(check, *options)
        assert finding.status == OK, finding


def test_a_loss_that_sees_a_difference(monkeypatch):
    def warmer(inputs, *rest):
        return fused_distill_loss(inputs._replace(teacher=inputs.teacher * 1.05), *rest)

    def other_label(inputs, *rest):
        return fused_distill_loss(inputs._replace(labels=inputs.labels.roll(1)), *rest)

    for spoilt_loss in (warmer, other_label):
        monkeypatch.setattr(preflight.checks.loss, "fused_distill_loss", spoilt_loss)
        bad = the_bad_one(found(preflight.checks.loss.check_loss))
        assert "expected a KL below" in bad.found and bad.remedy


def test_a_layer_that_is_not_the_teachers(monkeypatch):
    def forgetful(student, teacher, layers):
        doctor_models_apply(student, teacher, layers)
        with torch.no_grad():
            student.backbone.layers[2].mlp.down_proj.weight *= 1.1

    doctor_models_apply = preflight.checks.loss.apply_replacements
    monkeypatch.setattr(preflight.checks.loss, "apply_replacements", forgetful)
    assert "whole models" in the_bad_one(found(preflight.checks.loss.check_equal_models)).name


def test_a_large_teacher_is_not_loaded(monkeypatch):
    monkeypatch.setattr(preflight.checks.loss, "SMALL_MODEL", 1000)
    monkeypatch.setattr(preflight.checks.loss, "get_teacher_model", lambda *_: pytest.fail("was loaded"))
    (finding,) = found(preflight.checks.loss.check_equal_models)
    assert finding.status == OK and "only the loss" in finding.found


# --- data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def rows(path, *texts):
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    return path


ENOUGH = ("--seq_length", 3, "--batch_size", 1, "--grad_accumulation_steps", 1, "--epochs", 1)  # for a few letters


@pytest.mark.parametrize("streaming", ["--dataset_streaming", "--no_dataset_streaming"])
def test_text_that_can_be_read(tmp_path, datasets_cache, streaming):
    file = rows(tmp_path / "text.jsonl", "abcd", "", "abcdef")
    finding, empty = found(preflight.checks.text.check_data, "--dataset_name", file, streaming, *ENOUGH)
    assert finding.status == OK and "2 of the first 3 rows have text, of 5 characters" in finding.found
    assert empty.status == WARNING and "skipped 1 of 3 rows" in empty.found


@pytest.mark.parametrize(
    "options,word",
    [
        (("--dataset_text_field", "content"), "no such column"),
        (("--dataset_text_field", "n"), "expected text"),
        (("--dataset_split", "test"), "no such split"),
        (("--dataset_split", "train[:50%]", "--dataset_streaming"), "--dataset_split"),
    ],
)
def test_text_that_cannot_be_read(tmp_path, datasets_cache, options, word):
    file = rows(tmp_path / "text.jsonl", "abcd")
    options = ("--dataset_name", file, "--no_dataset_streaming", *options)
    assert word in the_bad_one(found(preflight.checks.text.check_data, *options)).found


@pytest.mark.parametrize(
    "options,needed",
    [
        (("--dataset_streaming", "--batch_size", 2), 16),
        (("--dataset_streaming", "--batch_size", 2, "--grad_accumulation_steps", 2), 16),
        (("--no_dataset_streaming", "--batch_size", 2, "--grad_accumulation_steps", 2), 32),
        (("--no_dataset_streaming", "--batch_size", 2, "--grad_accumulation_steps", 4, "--epochs", 2), 32),
    ],
)
def test_text_that_fills_no_step_of_a_run(tmp_path, datasets_cache, options, needed):
    options = (*ENOUGH, *options, "--dataset_name", tmp_path / "text.jsonl")
    rows(tmp_path / "text.jsonl", *["~"] * (needed // 2))  # and an end-of-text each
    assert statuses(found(preflight.checks.text.check_data, *options, nproc=2)) == [OK]
    rows(tmp_path / "text.jsonl", *["~"] * (needed // 2 - 1))
    bad = the_bad_one(found(preflight.checks.text.check_data, *options, nproc=2))
    assert f"{needed - 2} tokens in all, expected {needed}" in bad.found and "use more text" in bad.remedy


def test_held_out_text_that_fills_no_window(tmp_path, datasets_cache):
    options = ("--eval_interval", 5, "--eval_dataset_name", rows(tmp_path / "text.jsonl", "~"), "--seq_length")
    assert statuses(found(preflight.checks.text.check_held_out_data, *options, 1)) == [OK]
    assert (
        "2 tokens in all, expected 3"
        in the_bad_one(found(preflight.checks.text.check_held_out_data, *options, 2)).found
    )


def test_data_that_is_not_there(tmp_path, datasets_cache):
    bad = the_bad_one(found(preflight.checks.text.check_data, "--dataset_name", tmp_path / "none.jsonl"))
    assert "no such file" in bad.found
    empty = rows(tmp_path / "empty.jsonl", "", "")
    bad = next(f for f in found(preflight.checks.text.check_data, "--dataset_name", empty) if f.status == FAILURE)
    assert "none of the first 2 rows has text" in bad.found
    hub = ("--dataset_name", "someone/something", "--dataset_subset", "part")
    bad = the_bad_one(found(preflight.checks.text.check_data, *hub, "--local_files_only"))
    assert "load_dataset('someone/something', 'part', split='train')" in bad.remedy
    online = dataclasses.replace(case(*hub).args, local_files_only=False)
    bad = the_bad_one(run_check("data", preflight.checks.text.check_data, Case(online)), WARNING)
    assert "not on this disk" in bad.found


def test_a_data_set_of_the_hub_that_was_prepared_before(tmp_path, datasets_cache):
    """As `load_dataset` leaves it in its cache."""
    folder = tmp_path / "cache" / "someone___something" / "default" / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    info = {"splits": {"train": {"name": "train", "num_bytes": 999, "num_examples": 30, "dataset_name": "something"}}}
    info |= {"dataset_size": 999, "version": "0.0.0", "config_name": "default", "dataset_name": "something"}
    table = datasets.Dataset.from_dict({"text": ["abcd"] * 30})
    info["features"] = {"text": {"dtype": "string", "_type": "Value"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with datasets.arrow_writer.ArrowWriter(path=str(folder / "something-train.arrow"), features=table.features) as w:
        w.write_table(table.data.table)
        w.finalize()
    for more in (("--no_dataset_streaming", "--dataset_split", "train[:50%]"), ("--dataset_streaming",)):
        options = ("--dataset_name", "someone/something", "--local_files_only", *more)
        (finding,) = found(preflight.checks.text.check_data, *options)
        assert finding.status == OK and "16 of the first 16 rows" in finding.found
    options = ("--dataset_name", "someone/something", "--no_dataset_streaming")
    (finding,) = found(preflight.checks.text.check_room_for_packed_data, *options)
    assert finding.status == OK and "about 2e-06 GB" in finding.found, "its rows are there already: 3e-06 with them"


def test_of_a_part_of_a_split_the_first_rows_are_read(tmp_path, datasets_cache):
    file = rows(tmp_path / "text.jsonl", *["abcd"] * 40)
    options = ("--dataset_name", file, "--no_dataset_streaming", "--dataset_split", "train[:50%]")
    assert statuses(found(preflight.checks.text.check_data, *options)) == [OK]
    assert not list((tmp_path / "cache").rglob("*.arrow")), "no table is made"


def test_held_out_text_is_looked_at_too(tmp_path, datasets_cache):
    assert found(preflight.checks.text.check_held_out_data) == []
    options = ("--eval_interval", 5, "--eval_dataset_name", tmp_path / "none.jsonl")
    assert "--eval_dataset_name" in the_bad_one(found(preflight.checks.text.check_held_out_data, *options)).found
    options = ("--eval_interval", 5, "--eval_mmlu_dir", tmp_path)
    assert "--eval_mmlu_dir" in the_bad_one(found(preflight.checks.text.check_held_out_data, *options)).found
    options = ("--eval_interval", 5, "--eval_mmlu_dir", TINY / "mmlu")
    assert statuses(found(preflight.checks.text.check_held_out_data, *options)) == [OK, OK]


def full_disk(free):
    return lambda _: shutil._ntuple_diskusage(10**12, 10**12 - free, free)


def test_room_for_packed_data(tmp_path, monkeypatch):
    options = ("--dataset_cache_dir", tmp_path / "packed")
    assert statuses(found(preflight.checks.text.check_room_for_packed_data, *options)) == [OK]
    assert found(preflight.checks.text.check_room_for_packed_data, "--dataset_streaming") == []
    monkeypatch.setattr(shutil, "disk_usage", full_disk(1_000_000))
    bad = the_bad_one(found(preflight.checks.text.check_room_for_packed_data, *options), WARNING)
    assert "about 0.0029 GB" in bad.found and "--dataset_cache_dir" in bad.remedy
    bad = the_bad_one(found(preflight.checks.text.check_room_for_packed_data, "--dataset_text_field", "n"), WARNING)
    assert "the data cannot be read" in bad.found
    (tmp_path / "packed").write_text("")
    assert "cannot be written" in the_bad_one(found(preflight.checks.text.check_room_for_packed_data, *options)).found


# --- checkpoints and memory ----------------------------------------------------------------------------------


def test_an_output_dir_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    bad = the_bad_one(found(preflight.checks.storage.check_output_dir, "--output_dir", tmp_path / "file" / "run"))
    assert f"{tmp_path / 'file'} cannot be written" in bad.found

    def read_only(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    bad = the_bad_one(found(preflight.checks.storage.check_output_dir, "--output_dir", tmp_path / "run"))
    assert "Read-only file system" in bad.found


def test_an_output_dir_that_holds_another_run(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    options = ("--output_dir", tmp_path)
    assert "--resume auto" in the_bad_one(found(preflight.checks.storage.check_output_dir, *options)).remedy
    for more in (("--resume", "auto"), ("--resume_step", 5)):
        assert statuses(found(preflight.checks.storage.check_output_dir, *options, *more)) == [OK]
    (tmp_path / "checkpoint-5").rename(tmp_path / "checkpoint-0")
    assert "up to checkpoint-0" in the_bad_one(found(preflight.checks.storage.check_output_dir, *options)).found


def test_newer_checkpoints_than_the_one_to_go_on_from(tmp_path):
    old, new = (checkpoint_of(tmp_path, step) for step in (2, 6))
    options = ("--output_dir", tmp_path, "--resume")
    assert "up to checkpoint-6" in the_bad_one(found(preflight.checks.storage.check_output_dir, *options, old)).found
    assert statuses(found(preflight.checks.storage.check_output_dir, *options, new)) == [OK]
    (new / STATE_FILE).write_text("{")
    assert "up to checkpoint-6" in the_bad_one(found(preflight.checks.storage.check_output_dir, *options, old)).found
    findings = found(preflight.checks.storage.check_output_dir, *options, "auto")  # a run sets it aside
    assert findings[0].status == OK and "checkpoint-6 is bad" in the_bad_one(findings, WARNING).found


def test_an_output_dir_of_a_run_that_is_going_on(tmp_path):
    options = ("--output_dir", tmp_path)
    with lock_dir("--output_dir", tmp_path):
        assert "another run is writing" in the_bad_one(found(preflight.checks.storage.check_output_dir, *options)).found
    (tmp_path / ".lock").write_text("kept")
    assert statuses(found(preflight.checks.storage.check_output_dir, *options)) == [OK]
    assert (tmp_path / ".lock").read_text() == "kept"
    lock_dir("--output_dir", tmp_path).close()


def test_a_log_file_that_cannot_be_written(tmp_path):
    assert found(preflight.checks.storage.check_log_file) == []
    (tmp_path / "log").write_text("before")
    for file in (tmp_path / "log", tmp_path / "new" / "log"):
        assert statuses(found(preflight.checks.storage.check_log_file, "--log_file", file)) == [OK]
    for file in (tmp_path, tmp_path / "log" / "log"):
        assert (
            "cannot be written" in the_bad_one(found(preflight.checks.storage.check_log_file, "--log_file", file)).found
        )
    assert [file.name for file in tmp_path.iterdir()] == ["log"] and (tmp_path / "log").read_text() == "before"


def test_a_full_disk(tmp_path, monkeypatch):
    options = ("--output_dir", tmp_path / "run", "--save_total_limit", 1)
    assert statuses(found(preflight.checks.storage.check_disk, *options)) == [OK]
    monkeypatch.setattr(shutil, "disk_usage", full_disk(20_000_000))
    assert "expected room for two" in the_bad_one(found(preflight.checks.storage.check_disk, *options)).found
    monkeypatch.setattr(shutil, "disk_usage", full_disk(30_000_000))
    options = ("--output_dir", tmp_path / "run", "--max_steps", 100000)
    assert "--save_total_limit" in the_bad_one(found(preflight.checks.storage.check_disk, *options), WARNING).found
    assert not (tmp_path / "run").exists()


def test_room_for_what_a_run_has_still_to_save(tmp_path, monkeypatch):
    """--resume_step counts micro steps, --max_steps optimizer steps; what is there already has its room."""
    size = checkpoint_bytes(preflight.checks.models.skeletons(case())[1])
    monkeypatch.setattr(shutil, "disk_usage", full_disk(int(3.5 * size)))
    options = ("--output_dir", tmp_path, "--max_steps", 10, "--grad_accumulation_steps", 4, "--save_interval", 8)
    bad = the_bad_one(found(preflight.checks.storage.check_disk, *options, "--resume_step", 8), WARNING)
    assert "keeps up to 5" in bad.found
    assert statuses(found(preflight.checks.storage.check_disk, *options, "--resume_step", 24)) == [OK]
    checkpoint_of(tmp_path, 24, *options)
    assert statuses(found(preflight.checks.storage.check_disk, *options, "--resume", "auto")) == [OK]
    monkeypatch.setattr(shutil, "disk_usage", full_disk(int(1.5 * size)))
    limit = ("--save_total_limit", 1)
    (room,) = found(preflight.checks.storage.check_disk, *options, *limit, "--resume", "auto")
    assert room.status == OK and "1 are there, 1 more fit" in room.found


def test_little_host_memory(tmp_path, monkeypatch):
    assert statuses(found(preflight.checks.storage.check_host_memory)) == [OK]
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(preflight.checks.storage, "MEMORY_LIMIT", limit)
    limit.write_text("max\n")
    assert statuses(found(preflight.checks.storage.check_host_memory)) == [OK]
    limit.write_text("25000000\n")
    assert "--no_background_save" in the_bad_one(found(preflight.checks.storage.check_host_memory), WARNING).remedy
    assert statuses(found(preflight.checks.storage.check_host_memory, "--no_background_save")) == [OK]
    assert (
        "a machine with more" in the_bad_one(found(preflight.checks.storage.check_host_memory, nproc=8), WARNING).remedy
    )


def test_a_colocated_teacher_is_in_memory_once_a_rank():
    def held(*options):
        (finding,) = found(preflight.checks.storage.check_host_memory, *options, nproc=100)
        return float(re.search(r"takes ([\d.e+]+) GB", finding.found)[1])

    teacher, _ = preflight.checks.models.skeletons(case())
    of_one = sum(p.nbytes for p in teacher.parameters()) / 1e9
    assert held("--teacher_placement", "colocated") - held() == pytest.approx(99 * of_one, rel=0.1)


# --- charts --------------------------------------------------------------------------------------------------


def test_wandb_without_login_or_network(monkeypatch):
    wandb = pytest.importorskip("wandb")
    online = ("--wandb", "--wandb_mode", "online")
    assert found(preflight.checks.storage.check_wandb) == []
    monkeypatch.setattr(wandb, "login", lambda **_: raise_(wandb.errors.UsageError("api_key not configured")))
    bad = the_bad_one(run_check("--wandb", preflight.checks.storage.check_wandb, case(*online)))
    assert bad.found == "W&B does not start (api_key not configured)" and "wandb login" in bad.remedy
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    (well,) = found(preflight.checks.storage.check_wandb, *online)
    assert well.status == OK and well.found.startswith("online")


def test_wandb_has_the_mode_of_the_run(monkeypatch):
    """As `wandb offline` leaves it, too."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "login", lambda **_: pytest.fail("needs no login"))
    assert "offline" in found(preflight.checks.storage.check_wandb, "--wandb")[0].found  # the preset touches no network
    monkeypatch.setattr(wandb.setup().settings, "mode", "offline")
    args = dataclasses.replace(case("--wandb").args, local_files_only=False)
    (well,) = run_check("name", preflight.checks.storage.check_wandb, Case(args))
    assert well.status == OK and "offline, needs no login" in well.found and "wandb sync" in well.found


def test_charts_without_their_packages(monkeypatch):
    assert statuses(found(preflight.checks.storage.check_tensorboard, "--tensorboard")) == [OK]
    both = ("--wandb", "--tensorboard")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for check, package in (
        (preflight.checks.storage.check_wandb, "wandb"),
        (preflight.checks.storage.check_tensorboard, "tensorboard"),
    ):
        assert f"the package {package} is not installed" in the_bad_one(found(check, *both)).found
