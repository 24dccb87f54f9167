"""What the options of make_student.py are where the command line leaves them open, and which cannot be used."""

import ast

import pytest

import make_student
from conversion.checks import check_conversion
from conversion.options import parse_make_args
from inputs.option_values import PRESETS


def options(line):
    return parse_make_args(line.split())


def test_the_text_is_the_presets_where_none_is_given():
    args = options("--preset llamba-1b --output DIR")
    assert (args.calibration, args.calibration_subset) == ("HuggingFaceFW/fineweb-edu", "CC-MAIN-2014-49")
    args = options("--preset llamba-1b --output DIR --calibration mine.jsonl")
    assert (args.calibration, args.calibration_subset) == ("mine.jsonl", None)


def test_what_is_given_of_the_presets_text_is_kept():
    args = options(
        "--preset llama-1b --calibration_subset OTHER --calibration_split train[:5] --calibration_revision v1"
    )
    assert (args.calibration, args.calibration_subset) == ("HuggingFaceFW/fineweb-edu", "OTHER")
    assert (args.calibration_split, args.calibration_text_field) == ("train[:5]", "text")
    source = make_student.text_of(args)
    assert (source.revision, source.flags.revision) == ("v1", "--calibration_revision")


def test_the_folder_is_the_presets_where_its_student_is_built():
    assert options("--preset llama-1b").output == "students/llama-1b"
    assert options("--preset llama-1b --output DIR").output == "DIR"
    assert options("--preset llama-1b --teacher_model mine --student_model DIR").output == "DIR"


@pytest.mark.parametrize(
    "line", ["--teacher_model mine", "", "--preset tiny", "--preset llama-1b --teacher_model mine"]
)
def test_no_student_gets_the_name_of_another(line):
    """A folder of a published student's name would be found instead of it."""
    with pytest.raises(ValueError, match=r"\n  --output: has no default .* give --output, a new folder$"):
        options(line)


def test_the_command_in_the_docstring_can_be_used(tmp_path, monkeypatch):
    """It names no preset, whose layers are not those of this teacher, which has 16."""
    docstring = ast.get_docstring(ast.parse((PRESETS.parent / "make_student.py").read_text()))
    _, line = next(line for line in docstring.splitlines() if "--teacher_model" in line).split("make_student.py ")
    args = options(line)
    assert args.layers == [] and args.teacher_model == "meta-llama/Llama-3.2-1B-Instruct"
    monkeypatch.chdir(tmp_path)
    args.teacher_model = str(PRESETS / "llama-1b" / "teacher")
    monkeypatch.setattr("conversion.checks.shutil.disk_usage", lambda _: Room)
    assert check_conversion(args)[1].n_layer == 16


class Room:
    free = 10**15


def test_the_layers_are_the_presets_where_it_is_named():
    assert options("--preset llama-1b").layers == [0, 1, 7, 8, 15]
    assert options("--preset llama-1b --teacher_model mine --output DIR").layers == [0, 1, 7, 8, 15]
    assert options("--teacher_model mine --output DIR --layers 3").layers == [3]


def test_wrong_options_are_reported_together():
    with pytest.raises(ValueError) as error:
        options("--output DIR --layers 1 1 --calibration_tokens 100 --d_state 1")
    assert str(error.value).splitlines()[1:] == [
        "  --d_state 1: expected at least 2, at most 4_096",
        "  --layers 1 1: expected each index once, or -1 alone for none",
        "  --calibration_tokens 100: fills no window of --seq_length 256; raise it",
        "  --calibration_tokens 100: is too little text for --init closed_form; expected at least 512",
    ]
