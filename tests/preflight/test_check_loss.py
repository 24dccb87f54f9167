"""What doctor.py finds about the loss, correct and wrong."""

import pytest
import torch

from distillation.fused_loss import fused_distill_loss
from preflight.checks import loss, weights
from preflight.checks.basics import OK
from tests.preflight.cases import found, the_bad_one


@pytest.mark.parametrize("signal,dtype", [("hidden", "float32"), ("logits", "float32"), ("hidden", "bfloat16")])
def test_equal_models_have_no_loss(signal, dtype):
    options = ("--teacher_signal", signal, "--dtype", dtype, "--temperature", 2)
    for check in (loss.check_loss, loss.check_equal_models):
        (finding,) = found(check, *options)
        assert finding.status == OK, finding


def test_a_loss_that_sees_a_difference(monkeypatch):
    def warmer(inputs, *rest):
        return fused_distill_loss(inputs._replace(teacher=inputs.teacher * 1.05), *rest)

    def other_label(inputs, *rest):
        return fused_distill_loss(inputs._replace(labels=inputs.labels.roll(1)), *rest)

    for wrong_loss in (warmer, other_label):
        torch.manual_seed(0)  # the check draws its labels: of some draws, rolled labels have almost the same CE
        monkeypatch.setattr(loss, "fused_distill_loss", wrong_loss)
        bad = the_bad_one(found(loss.check_loss))
        assert "expected a KL below" in bad.found and bad.remedy


def test_a_layer_that_is_not_the_teachers(monkeypatch):
    def forgetful(student, teacher, layers):
        doctor_models_apply(student, teacher, layers)
        with torch.no_grad():
            student.backbone.layers[2].mlp.down_proj.weight *= 1.1

    doctor_models_apply = loss.apply_replacements
    monkeypatch.setattr(loss, "apply_replacements", forgetful)
    assert "whole models" in the_bad_one(found(loss.check_equal_models)).name


def test_a_large_teacher_is_not_loaded(monkeypatch):
    monkeypatch.setattr(weights, "SMALL_MODEL", 1000)
    monkeypatch.setattr(weights, "get_teacher_model", lambda *_: pytest.fail("was loaded"))
    (finding,) = found(loss.check_equal_models)
    assert finding.status == OK and "the loss alone was" in finding.found
