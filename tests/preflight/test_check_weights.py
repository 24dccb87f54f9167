"""What doctor.py finds among the weights and in the teacher's logits: numbers, or what is none and where."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from preflight.checks import loss, weights
from preflight.checks.basics import OK, WARNING, run_check
from tests.model_files import change_json, change_weight
from tests.preflight.cases import TINY, found, planned, statuses, the_bad_one

NAMES = {"teacher": "model.layers.1.self_attn.q_proj.weight", "student": "backbone.layers.1.mixer.in_proj.weight"}


@pytest.fixture(params=["teacher", "student"])
def role(request):
    return request.param


@pytest.fixture
def folder(tmp_path, role):
    return Path(shutil.copytree(TINY / role, tmp_path / role))


def with_one(value):
    """Returns a function that puts `value` into a copy of a weight."""

    def change(weight):
        weight = weight.clone()
        weight[-1, -1] = value
        return weight

    return change


def test_models_as_they_should_be():
    findings = [*found(weights.check_finite), *found(weights.check_logits)]
    assert statuses(findings) == [OK, OK, OK] and findings[0].name.startswith("weights of --teacher_model")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_weight_that_is_no_number_is_named(role, folder, value):
    change_weight(folder, NAMES[role], with_one(float(value)))
    bad = the_bad_one(found(weights.check_finite, f"--{role}_model", folder))
    assert f"{NAMES[role]} holds {value} in float32, expected numbers" in bad.found
    assert bad.name == f"weights of --{role}_model {folder}" and "copy the model again" in bad.remedy


def test_a_weight_too_large_for_the_runs_dtype(role, folder):
    change_weight(folder, NAMES[role], with_one(-1e5))
    assert set(statuses(found(weights.check_finite, f"--{role}_model", folder))) == {OK}
    bad = the_bad_one(found(weights.check_finite, f"--{role}_model", folder, "--dtype", "float16"))
    assert f"{NAMES[role]} holds -inf in float16" in bad.found and "--dtype bfloat16" in bad.remedy


def test_what_is_no_parameter_may_be_infinite(folder, role):
    """As the masks that older files hold."""
    tensors = {**load_file(folder / "model.safetensors"), "model.mask": torch.tensor([0.0, -torch.inf])}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert set(statuses(found(weights.check_finite, f"--{role}_model", folder))) == {OK}


def test_weights_of_other_names_than_the_models_are_read(folder, role):
    """As transformers renames some when it loads them."""
    tensors = load_file(folder / "model.safetensors")
    tensors["renamed"] = with_one(float("inf"))(tensors.pop(NAMES[role]))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "renamed holds inf" in the_bad_one(found(weights.check_finite, f"--{role}_model", folder)).found


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files_are_read(folder, role, zipped):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors[NAMES[role]] = with_one(float("nan"))(tensors[NAMES[role]])
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert NAMES[role] in the_bad_one(found(weights.check_finite, f"--{role}_model", folder)).found


def test_what_would_take_minutes_is_left_to_the_run(monkeypatch):
    monkeypatch.setattr(weights, "MOST_READ", 1000)
    monkeypatch.setattr(weights, "stored_tensors", lambda _: pytest.fail("was read"))
    findings = found(weights.check_finite)
    assert statuses(findings) == [OK, OK] and "not read" in findings[0].found


def test_both_models_together_have_a_limit(monkeypatch):
    sizes = [(TINY / role / "model.safetensors").stat().st_size for role in ("teacher", "student")]
    monkeypatch.setattr(weights, "MOST_READ", sum(sizes))
    assert [finding.found for finding in found(weights.check_finite)] == ["finite in float32"] * 2
    monkeypatch.setattr(weights, "MOST_READ", sum(sizes) - 1)
    first, second = found(weights.check_finite)
    assert first.found == "finite in float32" and "not read: the models together have more than" in second.found


def test_what_takes_long_is_announced_before_it_is_read(monkeypatch):
    read = []
    monkeypatch.setattr(weights, "stored_tensors", lambda file: iter(read.append(file) or ()))
    monkeypatch.setattr(weights, "LONG_READ", 1000)
    findings = run_check("weights", weights.check_finite, planned())
    first = next(findings)
    assert first.name.startswith("weights of --teacher_model") and "are read now" in first.found and not read
    assert "finite" in next(findings).found and len(read) == 1


def test_an_old_bin_file_that_is_large_is_not_held_in_memory(folder, role, monkeypatch):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(weights, "MOST_IN_MEMORY", 1000)
    for zipped, words in ((True, "finite in float32"), (False, "not read: pytorch_model.bin is of an old format")):
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        findings = found(weights.check_finite, f"--{role}_model", folder)
        (own,) = [finding for finding in findings if f"--{role}_model" in finding.name]
        assert own.status == OK and words in own.found


def test_a_teacher_that_does_not_run_is_not_asked():
    assert found(weights.check_logits, "--kl_weight", 0) == []
    (only,) = found(weights.check_finite, "--kl_weight", 0, "--layers", -1)
    assert "--student_model" in only.name


def test_logits_that_are_no_numbers_though_all_weights_are(tmp_path):
    teacher = Path(shutil.copytree(TINY / "teacher", tmp_path / "teacher"))
    change_json(teacher / "config.json", rms_norm_eps=-1e9)
    assert set(statuses(found(weights.check_finite, "--teacher_model", teacher))) == {OK}
    bad = the_bad_one(found(weights.check_logits, "--teacher_model", teacher))
    assert bad.name == "teacher's logits" and "not finite" in bad.found and "config.json" in bad.remedy
    skipped = the_bad_one(found(loss.check_equal_models, "--teacher_model", teacher), WARNING)
    assert "the teacher's logits are not finite" in skipped.found
