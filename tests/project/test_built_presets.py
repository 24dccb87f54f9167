"""The presets of students that make_student.py builds: their copies of configs are those of the models, they plan
without a network, and a model that is not made yet is one line with the command that makes it.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from arguments import parse_train_args
from conversion.student_config import student_config
from inputs.option_values import PRESETS, command_that_makes
from llamba import LlambaConfig, LlambaForCausalLM
from model_utils import locate_model
from preflight.checks import models
from preflight.checks.basics import FAILURE
from preflight.footprint import build_models, weights_by_fate
from presets import smollm2
from tests.preflight.cases import found

BUILT = ("llama-1b", "llama-3b", "llama-8b", "smollm2-135m")
OWN = ("model_type", "transformers_version", "_name_or_path", "architectures", "dtype")


def preset(name):
    return json.loads((PRESETS / name / "preset.json").read_text())


@pytest.fixture(autouse=True)
def nothing_is_made(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", BUILT)
def test_the_copy_of_the_students_config_is_what_make_student_derives(name):
    made = student_config(LlamaConfig.from_pretrained(PRESETS / name / "teacher")).to_dict()
    copy = LlambaConfig.from_pretrained(PRESETS / name / "student").to_dict()
    for values in (made, copy):
        for key in OWN:
            values.pop(key, None)
    assert copy == made


@pytest.mark.parametrize("size", ["1b", "3b", "8b"])
def test_the_copy_of_the_teachers_config_is_that_of_the_published_preset(size):
    copy, published = (PRESETS / f"{name}-{size}" / "teacher" / "config.json" for name in ("llama", "llamba"))
    assert json.loads(copy.read_text()) == json.loads(published.read_text())


@pytest.mark.parametrize("name", BUILT)
def test_a_run_can_be_planned_before_anything_is_made(name):
    args = parse_train_args(["--preset", name])
    teacher, student = build_models(args)
    assert student.config.attention_layers == args.layers and teacher.device == torch.device("meta")
    assert student.config.ssm_cfg["bias"] and args.copied_lr_factor == 0.1 and args.warmup_steps


def test_the_plan_counts_the_biases_of_a_built_student():
    args = parse_train_args(["--preset", "smollm2-135m"])
    _, student = build_models(args)
    mixers, D, H, N, P = 15, 576, 9, 64, 64
    rows = H * P + 2 * H * N + H * P + H  # of in_proj: x, B, C, z, A_log
    mixer = rows * D + rows + D * H * P + D + (H * P + 2 * H * N) * (4 + 1) + H
    attention = 2 * D * D + 2 * D * 192
    shared = 49152 * D + D + 30 * (2 * D + 3 * D * 1536)
    expected = 4 * (shared + mixers * mixer + (30 - mixers) * attention)
    assert sum(weights_by_fate(student).values()) == expected


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("local", [True, False])
def test_a_student_that_is_not_made_yet_names_the_command(name, local):
    command = f"python make_student.py --preset {name}"
    with pytest.raises(ValueError, match=f"^--student_model students/{name}: is not made yet; run `{command}` first"):
        locate_model("--student_model", preset(name)["common"]["student_model"], local)
    of_doctor = found(models.check_model_files, *["--local_files_only"] * local, preset=name)[-1]
    assert of_doctor.status == FAILURE and command in of_doctor.remedy


def test_a_teacher_that_is_not_made_yet_names_the_command():
    with pytest.raises(ValueError, match=r"run `python -m presets\.smollm2` first"):
        locate_model("--teacher_model", "teachers/smollm2-135m", False)
    assert Path(preset("smollm2-135m")["common"]["teacher_model"]) == smollm2.TEACHER


def test_a_student_that_is_made_is_used(tmp_path):
    folder = tmp_path / "students" / "llama-1b"
    small = LlambaConfig(vocab_size=8, d_model=8, n_layer=1, ssm_cfg={"n_v_heads": 1, "n_qk_heads": 1, "d_state": 4})
    LlambaForCausalLM(small).save_pretrained(folder)
    assert locate_model("--student_model", "students/llama-1b", True) == "students/llama-1b"


def test_published_models_are_made_by_no_command():
    assert command_that_makes("goombalab/Llamba-8B-untied-unaligned") is None


def test_a_gguf_file_is_to_be_converted_first(tmp_path):
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ValueError, match=r"is a GGUF file, .* run `python -m conversion\.gguf a\.gguf DIR`"):
        locate_model("--teacher_model", "a.gguf", True)
