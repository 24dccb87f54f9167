"""What doctor.py finds about models and tokens, as they should be and damaged."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distillation.pairing import PROBE
from preflight.checks import loss, models, storage
from preflight.checks.basics import FAILURE, OK, WARNING, run_check
from tests.model_files import change_json
from tests.preflight.cases import TINY, checkpoint_of, found, planned, raise_, statuses, the_bad_one


@pytest.fixture
def copy_of(tmp_path):
    """Copies a model of the tiny preset, to be damaged."""

    def make(role):
        return Path(shutil.copytree(TINY / role, tmp_path / role))

    return make


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_shard_is_missing(copy_of, role):
    folder = copy_of(role)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    bad = the_bad_one(found(models.check_model_files, f"--{role}_model", folder))
    assert "model-00002-of-00002.safetensors" in bad.found and bad.remedy == "copy them again"
    if role == "teacher":
        again = the_bad_one(found(loss.check_equal_models, f"--{role}_model", folder), WARNING)
        assert again.found == "skipped: the teacher is not complete on this disk, see above"


def test_names_of_the_hub_that_are_not_here(monkeypatch, tmp_path):
    monkeypatch.setattr("model_utils.snapshot_download", lambda *_, **__: raise_(OSError("not cached")))
    teacher, student = found(models.check_model_files, preset="llamba-8b")
    assert statuses([teacher, student]) == [WARNING, WARNING]
    assert "download it (16 GB)" in teacher.found and "(17 GB)" in student.found
    assert teacher.remedy.startswith("hf download meta-llama/Llama-3.1-8B-Instruct")
    findings = found(models.check_model_files, "--local_files_only", preset="llamba-8b")
    assert statuses(findings) == [FAILURE, FAILURE]


def test_a_student_that_is_a_llama(copy_of):
    bad = the_bad_one(found(models.check_model_files, "--student_model", copy_of("teacher")))
    assert "model_type 'llama'" in bad.found


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_quantised_model(copy_of, role):
    folder = copy_of(role)
    change_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    bad = the_bad_one(found(models.check_model_files, f"--{role}_model", folder))
    assert bad.found.startswith("its weights are quantised, by gptq as config.json says; supported are float32")
    assert bad.remedy == "give the model that it was made from"


def test_windows_beyond_the_context(copy_of):
    folder = copy_of("teacher")
    change_json(folder / "config.json", max_position_embeddings=64)
    assert statuses(found(models.check_configs, "--teacher_model", folder, "--seq_length", 64)) == [OK]
    bad = the_bad_one(found(models.check_configs, "--teacher_model", folder, "--seq_length", 65))
    assert bad.found.startswith("--seq_length 65: ") and "64 tokens at once" in bad.found


def test_layers_that_are_chosen_first():
    (well,) = found(models.check_configs, "--layers", "auto:2")
    assert "with --layers 1 4 from the teacher; --layers auto:2: they are chosen first, at most about" in well.found
    bad = the_bad_one(found(models.check_configs, "--layers", "auto:6"))
    assert "--layers auto:6: expected --layers auto:1 to auto:5" in bad.found


def test_models_that_do_not_go_together(copy_of, tmp_path):
    interval = ("--layer_map_interval", 5)
    bad = the_bad_one(found(models.check_configs, "--layers", 1, 9))
    assert "[9] out of range" in bad.found
    bad = the_bad_one(found(storage.check_disk, "--layers", 1, 9), WARNING)
    assert bad.found == "skipped: teacher and student do not go together, see above"
    bad = the_bad_one(found(models.check_configs, "--gradient_checkpointing", "--checkpoint_blocks", 9))
    assert "--checkpoint_blocks 9" in bad.found
    change_json(copy_of("teacher") / "config.json", num_hidden_layers=5)
    teacher = ("--teacher_model", tmp_path / "teacher")
    assert "the teacher 5 of" in the_bad_one(found(models.check_configs, *teacher, *interval)).found
    assert statuses(found(models.check_configs, *teacher)) == [OK]
    (well,) = found(models.check_configs, *interval)
    assert well.status == OK and "--layers 1 2 3 from" in well.found


def test_a_checkpoint_that_cannot_be_resumed_from(tmp_path):
    assert "starts at 0" in found(models.check_resume, "--resume", "auto", "--output_dir", tmp_path)[0].found
    (tmp_path / "checkpoint-5").mkdir()
    findings = found(models.check_resume, "--resume", "auto", "--output_dir", tmp_path)
    assert findings[0].status == FAILURE and "no good checkpoint" in findings[0].found
    (tmp_path / "checkpoint-5" / "training_state.json").write_text("{}")
    both = planned("--resume", "auto", "--output_dir", tmp_path)
    findings = [list(run_check("name", check, both)) for check in (models.check_resume, models.check_model_files)]
    assert statuses(findings[0]) == [FAILURE, WARNING] and statuses(findings[1]) == [OK, OK], (
        "a bad checkpoint is reported once"
    )


def test_a_resumed_run_with_the_same_options_is_the_same_run(tmp_path):
    """Also where an option is left for the run to choose."""
    options = ("--output_dir", tmp_path, "--resume", "auto")
    checkpoint_of(tmp_path, 6, *options)
    (well,) = found(models.check_resume, *options)
    assert well.status == OK and "checkpoint-6" in well.found
    changed = the_bad_one(found(models.check_resume, *options, "--max_lr", 0.5), WARNING)
    assert "resuming with --max_lr 0.5 where the run had 0.002" in changed.found


def test_mixers_that_were_not_fitted_beside_the_heads():
    bad = the_bad_one(found(models.check_configs, "--heads", "0:3,4:1,5:2"), WARNING)
    assert bad.found.startswith("--heads 0:3,4:1,5:2: the mixers of --student_model were not fitted beside")
    assert "align this one first" in bad.remedy


def test_a_resumed_run_has_the_layers_and_heads_that_were_chosen_for_it(tmp_path):
    options = ("--output_dir", tmp_path, "--resume", "auto", "--layers")
    checkpoint_of(tmp_path, 6, *options, 2, 3, "--heads", "5:0,4:1")
    well, _ = found(models.check_configs, *options, "auto:2", "--heads", "auto:2")
    assert well.status == OK and well.found.endswith("with --layers 2 3 --heads 4:1,5:0 from the teacher")


def test_a_vocabulary_that_is_too_small(copy_of):
    folder = copy_of("student")
    change_json(folder / "config.json", vocab_size=1000)
    findings = found(models.check_tokens, "--student_model", folder)
    bad = the_bad_one(findings)
    assert "--student_model has a vocabulary of 1000" in bad.found and "24 token(s) beyond it" in bad.found
    assert any("1000 entries are shared; the loss leaves out the others" in finding.found for finding in findings)


def test_a_student_with_other_tokens(copy_of):
    folder = copy_of("student")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    change = {"model": {**tokenizer["model"], "vocab": {**vocab, "q": vocab["Q"], "Q": vocab["q"]}}}
    change_json(folder / "tokenizer.json", **change)
    bad = the_bad_one(found(models.check_tokens, "--student_model", folder))
    assert bad.name == "student's tokenizer" and "2 of its tokens, such as 'Q', have other ids" in bad.found
    fewer_merges = {**tokenizer["model"], "merges": tokenizer["model"]["merges"][:100]}
    change_json(folder / "tokenizer.json", model=fewer_merges)
    bad = the_bad_one(found(models.check_tokens, "--student_model", folder))
    assert bad.name == "student's tokenizer" and "into other tokens than the teacher" in bad.found
    for file in folder.glob("tokenizer*"):
        file.unlink()
    findings = found(models.check_tokens, "--student_model", folder)
    assert set(statuses(findings)) == {OK} and "none of its own" in findings[-1].found


def test_a_tokenizer_without_an_end(copy_of):
    folder = copy_of("teacher")
    change_json(folder / "tokenizer_config.json", eos_token=None)
    assert "has no eos_token" in the_bad_one(found(models.check_tokens, "--teacher_model", folder)).found


def test_special_tokens_of_another_model(copy_of):
    teacher, student = copy_of("teacher"), copy_of("student")
    change_json(teacher / "config.json", bos_token_id=5)
    bad = the_bad_one(found(models.check_special_tokens, "--teacher_model", teacher))
    assert bad.name == "teacher's bos_token_id" and bad.found == "5 in config.json, 0 in the tokenizer"
    change_json(student / "config.json", eos_token_id=7)
    bad = the_bad_one(found(models.check_special_tokens, "--student_model", student), WARNING)
    assert bad.name == "student's eos_token_id"
    change_json(student / "config.json", bos_token_id=None, eos_token_id=[3, 0])
    findings = found(models.check_special_tokens, "--student_model", student)
    assert set(statuses(findings)) == {OK}


def test_the_probe_has_every_script():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "teacher")
    assert tokenizer.decode(tokenizer(PROBE)["input_ids"]) == PROBE
    assert all(part in PROBE for part in ("fox", "def f(x)", "模型", "🚀", "1234567890"))
