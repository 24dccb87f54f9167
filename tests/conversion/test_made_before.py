"""A student that was begun or made with other options is named with these before any text or weight is read."""

import json

import pytest
import torch

import make_student
from conversion.build import Recipe, _digest
from conversion.calibration import Windows
from conversion.options import parse_make_args
from conversion.unfinished import FIGURES, MADE_WITH, check_output, differences
from inputs.option_values import PRESETS

TEACHER = str(PRESETS / "tiny" / "teacher")
CPU = torch.device("cpu")
MADE = {"teacher": {"name": TEACHER, "config": "c", "files": []}, **Recipe().made_with(CPU), "text": "t"}
LINE = f"--preset tiny --teacher_model {TEACHER} --dtype bfloat16 --device cpu --seed 0"


def save(folder, name, content):
    folder.mkdir()
    (folder / name).write_text(json.dumps(content))


def error_of(tmp_path, monkeypatch, more):
    """Returns the error of a command that touches neither text nor weights."""
    monkeypatch.setattr(make_student, "read_windows", lambda *_: pytest.fail("text was read"))
    monkeypatch.setattr(make_student, "teacher_folder", lambda *_: pytest.fail("a teacher was fetched"))
    args = parse_make_args([*LINE.split(), "--output", str(tmp_path / "made"), *more.split()])
    with pytest.raises(ValueError) as error:
        make_student.main(args)
    assert "\n" not in str(error.value)
    return str(error.value)


OTHERS = [
    ("--layers -1 --init random", "--init closed_form (now random)"),
    ("--layers -1 --seed 3 --d_state 8", "--d_state None (now 8), --seed 0 (now 3)"),
    ("--layers -1 --no_ssm_bias --dtype float32", "--ssm_bias True (now False), --dtype bfloat16 (now float32)"),
    ("--layers 1 2", "--layers -1 (now 1 2)"),
    ("--layers -1 --heads 1:2,0:3", "--heads None (now 0:3 1:2)"),
]


@pytest.mark.parametrize("more,expected", OTHERS)
def test_one_that_was_begun_with_others(tmp_path, monkeypatch, more, expected):
    save(tmp_path / "made.unfinished", MADE_WITH, MADE)
    message = error_of(tmp_path, monkeypatch, more)
    assert message == (
        f"--output {tmp_path / 'made'}: {tmp_path / 'made.unfinished'} was begun with {expected}; give the same to "
        "resume it, delete it, or give another name"
    )


def test_one_that_waits_for_heads(tmp_path, monkeypatch):
    save(tmp_path / "made", FIGURES, {"made_with": {**MADE, "heads": ["0:3"]}})
    assert "was made with --heads 0:3 (now None); give" in error_of(tmp_path, monkeypatch, "--layers -1")


def test_a_finished_one(tmp_path, monkeypatch):
    save(tmp_path / "made", FIGURES, {"made_with": MADE})
    message = error_of(tmp_path, monkeypatch, "--layers 1 --seed 3")
    assert message.endswith(
        "was made with --layers -1 (now 1), --seed 0 (now 3); give the same to use it, or give another name"
    )
    message = error_of(tmp_path, monkeypatch, "--layers 1")
    assert "only what was measured differs, and train_gpus.py can put any --layers into this student" in message
    check_output(tmp_path / "made", MADE)
    check_output(tmp_path / "made", {"teacher": {"name": TEACHER}, **Recipe().made_with(CPU)})


def test_what_is_known_late_is_named_without_its_digests():
    other = {**MADE, "teacher": {**MADE["teacher"], "files": [["a", 1, 2]]}, "text": "u", "device": "cuda"}
    assert list(differences(MADE, other).values()) == [
        "--device cpu (now cuda)",
        f"other files of --teacher_model {TEACHER}",
        "other text (--calibration and its options)",
    ]
    other["teacher"] = {**other["teacher"], "name": "another"}
    assert differences(MADE, other)["teacher"] == f"--teacher_model {TEACHER} (now another)"


def test_windows_of_other_lengths_are_another_text():
    tokens, held_out = torch.arange(64), torch.zeros(1, 3, dtype=torch.int64)
    assert _digest(Windows(tokens.view(4, 16), held_out)) != _digest(Windows(tokens.view(2, 32), held_out))
