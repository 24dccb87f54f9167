"""Paths of users: `~` and variables in every option and argument that takes one, from every place that a value comes
from; and what a run writes down, which means the same path with other variables.
"""

import argparse
import dataclasses
import json
import pwd
import sys
from pathlib import Path

import pytest

import doctor
import report
from arguments import EvalArguments, TrainArguments
from checkpointing.resume import check_same_run
from inputs import option_values
from inputs.option_files import as_yaml
from inputs.options import kind_of, options_of
from llamba import export
from paths import expanded, literal
from presets import make_tiny
from tests.parsing import train_error, train_options

ROOT_USER = pwd.getpwuid(0)
SECTIONS = {TrainArguments: "train", EvalArguments: "eval"}
PATHS = [(cls, name) for cls in SECTIONS for name, about in options_of(cls).items() if about.is_path]


@pytest.fixture(autouse=True)
def variables(monkeypatch):
    """Sets a home directory and a variable, and takes another variable away."""
    for name, value in {"HOME": "/home/me", "DATA": "/big/data", "EMPTY": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MISSING", raising=False)


def values_of(cls, *argv):
    """Returns what command line, file and preset give, without the checks between options."""
    return option_values.option_values(cls, SECTIONS[cls], "", list(argv))[0]


# --- one path ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~", "/home/me"),
        ("~/x", "/home/me/x"),
        ("$DATA/x", "/big/data/x"),
        ("${DATA}x/~", "/big/datax/~"),
        ("~/$DATA", "/home/me//big/data"),
        (f"~{ROOT_USER.pw_name}/x", f"{ROOT_USER.pw_dir}/x"),
        ("a$$b", "a$b"),
        ("$$DATA", "$DATA"),
        ("./~/x", "./~/x"),
        ("x~", "x~"),
        ("x" * 255 + "/" + "ü" * 127, "x" * 255 + "/" + "ü" * 127),
        ("a/" * 2047 + "a", "a/" * 2047 + "a"),
        ("a\udcff", "a\udcff"),  # a byte that is not UTF-8, as Python has it
        ("auto", "auto"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("hf://datasets/~me/$x", "hf://datasets/~me/$x"),
        ("s3://bucket/a$$b", "s3://bucket/a$$b"),
    ],
)
def test_home_and_variables(text, path):
    assert expanded(text) == path


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("$MISSING/x", "'$MISSING/x': the environment variable MISSING is not set, or is empty; set it, or write $$"),
        ("${MISSING}/x", "the environment variable MISSING is not set"),
        ("$EMPTY/x", "the environment variable EMPTY is not set, or is empty"),
        ("cost$", "'cost$': expected $NAME or ${NAME}; write $$ for a dollar sign"),
        ("${DATA", "expected $NAME or ${NAME}"),
        ("${DATA:-x}", "expected $NAME or ${NAME}"),
        ("$1", "expected $NAME or ${NAME}"),
        ("~no-such-user/x", "this home directory is not known; write ./~ for"),
        ("", "'': expected a name or a path; give one, or leave the option out"),
        (" ", "' ': expected a name or a path"),
        ("a\0b", r"'a\x00b': no path holds a zero byte"),
        ("a/" + "ü" * 128, "a name in it has 256 bytes, expected 255 at most"),
        ("a/" * 3000, "it has 6000 bytes, expected 4095 at most"),
        ("$DATA" + "/a" * 2047, "it has 4103 bytes, expected 4095 at most"),
        ("~a\0b", "no path holds a zero byte"),
        ("a\ud800", "a character of it stands for none"),
    ],
)
def test_a_path_that_means_nothing(text, problem):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        expanded(text)
    assert problem in str(error.value)


def test_an_empty_home_is_not_the_root(monkeypatch):
    monkeypatch.setenv("HOME", "")
    with pytest.raises(argparse.ArgumentTypeError, match="this home directory is not known"):
        expanded("~/x")


@pytest.mark.parametrize("path", ["/a b", "a$b", "$$", "~", "~/x", "./~x", "s3://b/$x", "${DATA}", "\udcff/$", "x"])
def test_what_is_written_down_is_read_as_the_same_path(path):
    assert Path(expanded(literal(path))) == Path(path)


# --- every option --------------------------------------------------------------------------------------------


def test_which_options_are_paths():
    common = {"config", "teacher_model", "student_model"}
    training = {"dataset_name", "dataset_cache_dir", "resume", "eval_dataset_name", "eval_mmlu_dir", "output_dir"}
    assert {name for cls, name in PATHS if cls is TrainArguments} == common | training | {"log_file", "plan_json"}
    assert {name for cls, name in PATHS if cls is EvalArguments} == common | {"ckpt", "output", "mmlu_dir", "held_out"}


@pytest.mark.parametrize(("cls", "name"), [path for path in PATHS if path[1] != "config"])
def test_every_path_is_expanded_wherever_it_is_given(cls, name, tmp_path, monkeypatch):
    file = tmp_path / "options.yaml"
    file.write_text(f"{name}: ~/$DATA/x\n")
    assert values_of(cls, f"--{name}", "~/$DATA/x")[name] == "/home/me//big/data/x"
    assert values_of(cls, "--config", str(file))[name] == "/home/me//big/data/x"
    file.write_text(f"{name}: ~/$MISSING\n")
    with pytest.raises(ValueError, match=f"--config {file}: argument --{name}: .*MISSING is not set"):
        values_of(cls, "--config", str(file))
    with pytest.raises(ValueError, match=f"argument --{name}: .*MISSING is not set"):
        values_of(cls, f"--{name}", "$MISSING")

    (tmp_path / "mine").mkdir()
    preset = {"common": {}, "train": {}, "eval": {}, SECTIONS[cls]: {name: "$DATA/x", "seed": 3}}
    (tmp_path / "mine" / "preset.json").write_text(json.dumps(preset))
    monkeypatch.setattr(option_values, "PRESETS", tmp_path)
    assert option_values.preset_values("mine", cls, SECTIONS[cls]) == {name: "/big/data/x", "seed": 3}


def test_the_file_of_options_is_a_path_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("seed: 7\n")
    args = train_options("--config ~/mine.yaml")
    assert (args.seed, args.config) == (7, str(tmp_path / "mine.yaml"))
    assert "argument --config: '$MISSING'" in train_error("--config $MISSING")


def test_a_presets_own_files_are_where_it_is(tmp_path, monkeypatch):
    """The folder of presets may have a dollar sign in its name."""
    folder = tmp_path / "$MISSING" / "mine"
    folder.mkdir(parents=True)
    (folder / "preset.json").write_text('{"common": {"teacher_model": "./teacher"}, "train": {}, "eval": {}}')
    monkeypatch.setattr(option_values, "PRESETS", folder.parent)
    values = option_values.preset_values("mine", TrainArguments, "train")
    assert values == {"teacher_model": str(folder / "teacher")}


def named(cls):
    """Returns the options of a class that hold text of any kind."""
    kinds = {field.name: kind_of(field.type) for field in dataclasses.fields(cls) if field.name in options_of(cls)}
    return [name for name, (kind, choices, _) in kinds.items() if kind is str and not choices]


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls in SECTIONS for name in named(cls)])
@pytest.mark.parametrize("text", ["", "  "])
def test_no_name_is_blank(cls, name, text):
    with pytest.raises(ValueError, match=f"argument --{name}: '{text}': expected .*; see --help"):
        values_of(cls, f"--{name}", text)


# --- what is written down ------------------------------------------------------------------------------------


def test_a_run_repeats_with_the_paths_that_it_had(tmp_path, monkeypatch):
    args = train_options("--output_dir ~/x --log_file $DATA/a$$b --dataset_name ./~x --teacher_model hf://$x")
    file = tmp_path / "args.yaml"
    file.write_text(as_yaml(args))
    monkeypatch.setenv("HOME", "/home/other")
    monkeypatch.delenv("DATA")
    again = train_options(f"--config {file}")
    assert (again.output_dir, again.log_file) == ("/home/me/x", "/big/data/a$b")
    assert (again.dataset_name, again.teacher_model) == ("./~x", "hf://$x")


def test_a_checkpoint_may_have_a_path_that_was_not_expanded():
    """Earlier versions recorded `~/text` as it was given."""
    args = train_options("--preset tiny --dataset_name ~/text")
    before = {**vars(args), "dataset_name": "~/text"}
    check_same_run(Path("c"), {"arguments": before, "world_size": 1}, args, 1)
    with pytest.raises(ValueError, match="--dataset_name /home/me/text: the run of c has ~/other"):
        check_same_run(Path("c"), {"arguments": before | {"dataset_name": "~/other"}, "world_size": 1}, args, 1)


# --- the other commands --------------------------------------------------------------------------------------


def test_arguments_of_other_commands(monkeypatch):
    """Each is stopped where it would use the path first."""
    seen = []

    def stop(*args, **kwargs):
        seen.extend(args)
        raise SystemExit

    monkeypatch.setattr(report, "write_page", stop)
    monkeypatch.setattr(doctor, "file_problem", stop)
    monkeypatch.setattr(export, "export", stop)
    monkeypatch.setattr(make_tiny, "make", stop)
    commands = [
        (report.main, ["~/run", "$DATA/run", "--output", "~/a.html"], [[Path("/home/me/run"), Path("/big/data/run")]]),
        (doctor.main, ["--json", "$DATA/a.json"], [Path("/big/data/a.json")]),
        (export.main, ["~/ckpt", "${DATA}/out"], ["/home/me/ckpt", "/big/data/out"]),
        (make_tiny.main, ["--out", "~/tiny"], [Path("/home/me/tiny")]),
    ]
    for main, argv, paths in commands:
        seen.clear()
        monkeypatch.setattr(sys, "argv", ["x", *argv])
        with pytest.raises(SystemExit):
            main()
        assert seen[: len(paths)] == paths
