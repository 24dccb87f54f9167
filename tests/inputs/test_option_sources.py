"""Where values come from: presets over the defaults, files of options over presets, the command line over all; and
every mistake in one of them as a ValueError that names it.
"""

import dataclasses
import json

import pytest

from arguments import TrainArguments
from inputs import option_values
from inputs.option_files import as_yaml
from tests.parsing import PRODUCTION, eval_error, eval_options, train_error, train_options

SHIPPED = sorted(path.parent.name for path in option_values.PRESETS.glob("*/preset.json"))


@pytest.fixture
def preset(tmp_path, monkeypatch):
    """Writes a preset of a test's own, in the place of those that are shipped."""
    monkeypatch.setattr(option_values, "PRESETS", tmp_path)

    def write(name="mine", common=None, train=None, evaluation=None):
        basics = {"teacher_model": "T", "student_model": "S", "layers": [1], "dtype": "float32"}
        data = {"dataset_name": "D", "seq_length": 8, "batch_size": 3, "output_dir": "O"}
        sections = {
            "common": {**basics, **(common or {})},
            "train": {**data, **(train or {})},
            "eval": evaluation or {},
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "preset.json").write_text(json.dumps(sections))

    return write


# --- presets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_presets_give_what_has_no_default(name):
    for args in (train_options(f"--preset {name}"), eval_options(f"--preset {name}")):
        for field in dataclasses.fields(args):
            assert getattr(args, field.name) is not dataclasses.MISSING, field.name


def test_a_preset_overrides_defaults_and_the_command_line_overrides_it(preset):
    preset(common={"seed": 5}, train={"max_lr": 0.5, "freeze_mlp": True, "log_interval": 3})
    args = train_options("--preset mine --log_interval 4")
    assert (args.seed, args.max_lr, args.freeze_mlp, args.log_interval) == (5, 0.5, True, 4)
    assert args.epochs == TrainArguments.epochs == 1
    assert train_options("--preset mine --no_freeze_mlp").freeze_mlp is False


def test_sections_are_for_their_own_entry(preset):
    preset(train={"batch_size": 3}, evaluation={"batch_size": 5, "num_fewshot": 2})
    args = eval_options("--preset mine")
    assert (args.batch_size, args.num_fewshot) == (5, 2)
    assert train_options("--preset mine").batch_size == 3


def test_dot_slash_is_the_presets_folder(preset, tmp_path):
    preset(common={"teacher_model": "./teacher"}, train={"dataset_name": "./text/a.jsonl", "output_dir": "runs/x"})
    args = train_options("--preset mine --student_model ./student")
    assert args.teacher_model == str(tmp_path / "mine" / "teacher")
    assert args.dataset_name == str(tmp_path / "mine" / "text" / "a.jsonl")
    assert args.output_dir == "runs/x"
    assert args.student_model == "./student"  # the user's own: relative to the working directory


def test_another_dataset_drops_the_presets_dataset_options(preset):
    preset(train={"dataset_subset": "part", "dataset_split": "half", "dataset_streaming": False})
    own = train_options("--preset mine")
    assert (own.dataset_name, own.dataset_subset, own.dataset_split, own.dataset_streaming) == (
        "D",
        "part",
        "half",
        False,
    )
    other = train_options("--preset mine --dataset_name other --dataset_split test")
    assert (other.dataset_name, other.dataset_subset, other.dataset_split, other.dataset_streaming) == (
        "other",
        None,
        "test",
        False,  # not what the data is, but how it is read
    )
    assert (other.seq_length, other.batch_size) == (8, 3)


def test_another_dataset_drops_the_presets_held_out_text(preset):
    preset(train={"eval_dataset_name": "H", "eval_dataset_split": "half", "eval_interval": 7})
    own = train_options("--preset mine")
    assert (own.eval_interval, own.held_out_text()) == (7, ("H", None, "half"))
    other = train_options("--preset mine --eval_dataset_name other --eval_dataset_subset part")
    assert other.held_out_text() == ("other", "part", "train")
    message = train_error("--preset mine --dataset_name other")
    assert "--eval_interval 7: 'other', split 'train', is trained on" in message


def test_without_evaluations_a_presets_held_out_text_is_none(preset):
    preset(train={"eval_dataset_name": "H", "eval_interval": 7})
    assert train_options("--preset mine --eval_interval 0").eval_dataset_name is None


def test_an_unknown_preset_lists_the_known(preset):
    preset("zebra")
    preset("ant")
    assert train_error("--preset llama") == "--preset llama: expected one of ant, zebra"


@pytest.mark.parametrize("section", ["common", "train"])
def test_an_unknown_key_of_a_preset(preset, tmp_path, section):
    preset(**{section: {"batch_sise": 1}})
    message = train_error("--preset mine")
    assert "batch_sise" in message and str(tmp_path / "mine" / "preset.json") in message


def test_a_key_of_the_other_entry_is_unknown(preset):
    preset(common={"freeze_mlp": True})
    assert "freeze_mlp" in eval_error("--preset mine")


@pytest.mark.parametrize("content", ["", "[]", '{"common": {}}', '{"common": 1, "train": {}}', "\x00"])
def test_a_file_that_is_no_preset(tmp_path, monkeypatch, content):
    monkeypatch.setattr(option_values, "PRESETS", tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "preset.json").write_text(content)
    message = train_error("--preset mine")
    assert "preset.json: cannot be read as a preset" in message and "\n" not in message


@pytest.mark.parametrize(("key", "value"), [("seed", "two"), ("seed", None), ("wandb", 1), ("dtype", "int8")])
def test_a_value_of_a_preset_is_read_as_on_the_command_line(preset, tmp_path, key, value):
    preset(common={key: value} if key != "wandb" else {}, train={key: value} if key == "wandb" else {})
    assert train_error("--preset mine").startswith(str(tmp_path / "mine" / "preset.json") + ": ")


# --- files of options ----------------------------------------------------------------------------------------


def config(tmp_path, text):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    return f"--config {file}"


def test_a_file_overrides_the_preset_and_the_command_line_overrides_it(tmp_path):
    line = config(tmp_path, "preset: tiny\nmax_lr: 1e-4\nbatch_size: 7\nlayers: [2, 3]\nfreeze_mlp: true\n")
    args = train_options(f"{line} --batch_size 9 --no_freeze_mlp")
    assert (args.max_lr, args.batch_size, args.layers, args.freeze_mlp) == (1e-4, 9, [2, 3], False)
    assert (args.seq_length, args.preset) == (256, "tiny")


@pytest.mark.parametrize(
    "text,option,value",
    [
        ("dataset_subset: null", "dataset_subset", None),
        ("dataset_subset: ~", "dataset_subset", None),
        ("wandb_run_name: 007", "wandb_run_name", "007"),
        ("dataset_revision: 2024-01-01", "dataset_revision", "2024-01-01"),
        ("max_steps: 1_000", "max_steps", 1000),
        ("layers: 3", "layers", [3]),
        ("layers: [-1]", "layers", []),
        ("layers: []", "layers", []),
        ("max_lr: 1", "max_lr", 1.0),
        ("dataset_streaming: no", "dataset_streaming", False),
        ("dataset_name: -odd name", "dataset_name", "-odd name"),
        ("", "seed", 0),
    ],
)
def test_values_of_a_file(tmp_path, text, option, value):
    assert getattr(train_options(config(tmp_path, text)), option) == value


@pytest.mark.parametrize(
    "text,problem",
    [
        ("seq_lenght: 3", "there is no option 'seq_lenght'; did you mean seq_length?"),
        ("qqq: 3", "there is no option 'qqq'; --help lists"),
        ("config: x.yaml", "there is no option 'config'"),
        ("seq_length: 3\nseq_length: 4", "seq_length is given twice"),
        ("- 3", "expected lines such as `seq_length: 1024`"),
        ("a: [", "cannot be read"),
        ("seq_length: 3.5", "argument --seq_length: '3.5': expected a whole number"),
        ("dtype: int8", "invalid choice: 'int8'"),
        ("max_lr: null", "max_lr: None: expected a value"),
        ("max_lr: {a: 1}", "expected a value"),
        ("max_lr: []", "--max_lr: expected one argument"),
        ("? [a]\n: b", "cannot be read"),
        ("max_lr: true", "expected a value"),
        ("wandb: sometimes", "wandb: 'sometimes': expected true or false"),
        ("freeze_mlp: 1", "expected true or false"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, problem):
    line = config(tmp_path, text)
    message = train_error(line)
    assert message.startswith(line) and problem in message


def test_a_preset_that_is_no_name(tmp_path):
    assert "--preset 5: expected one of" in train_error(config(tmp_path, "preset: 5"))


def test_a_file_that_is_not_there():
    assert "--config no-such.yaml: cannot be read" in train_error("--config no-such.yaml")
    assert "--config" in train_error("--config")


def test_options_of_a_file_are_checked_like_others(tmp_path):
    assert "--seq_length 0: expected at least 1" in train_error(config(tmp_path, "seq_length: 0"))


def test_another_dataset_drops_the_dataset_options_of_a_file(tmp_path):
    text = "dataset_name: A\ndataset_subset: part\ndataset_text_field: body\ndataset_streaming: false\n"
    args = train_options(config(tmp_path, text) + " --dataset_name B")
    assert (args.dataset_name, args.dataset_subset, args.dataset_text_field) == ("B", None, "text")
    assert args.dataset_streaming is False


def test_the_last_way_to_say_how_long_the_warm_up_is_counts(tmp_path):
    line = config(tmp_path, "warmup_steps: 10\nwarmup_ratio: 0.5\n")  # as args.yaml has both
    assert train_options(line).warmup_steps == 10
    args = train_options(f"{line} --warmup_ratio 0.2")
    assert (args.warmup_steps, args.warmup_ratio) == (None, 0.2)
    assert train_options(f"{line} --warmup_ratio 0.2 --warmup_steps 3").warmup_steps == 3
    assert train_options("--preset tiny --warmup_steps 3").warmup_steps == 3


def test_evaluations_of_a_file_can_be_turned_off(tmp_path):
    line = config(tmp_path, "eval_interval: 5\neval_dataset_name: H\neval_mmlu_dir: M\n")
    assert train_options(line).eval_dataset_name == "H"
    off = train_options(f"{line} --eval_interval 0")
    assert (off.eval_dataset_name, off.eval_mmlu_dir) == (None, None)
    assert "give --eval_interval" in train_error(config(tmp_path, "eval_dataset_name: H\n"))


@pytest.mark.parametrize("line", [PRODUCTION, "--preset tiny --eval_interval 5 --max_lr 3e-4", "--layers -1"])
def test_what_a_run_writes_down_repeats_it(tmp_path, line):
    args = train_options(line)
    again = train_options(config(tmp_path, as_yaml(args)))
    assert {**vars(again), "config": None} == vars(args)
    assert train_options(config(tmp_path, as_yaml(args)) + " --seed 5").seed == 5


def test_heads_in_a_file(tmp_path):
    for text in ("heads: 13:18,15:11", "heads: [13:18, 15:11]", "heads: ['13:18', '15:11']"):
        args = train_options(config(tmp_path, text))
        assert args.kept_heads == {13: [18], 15: [11]}
        assert train_options(config(tmp_path, as_yaml(args))).heads == args.heads


def test_layers_in_a_file_count_as_given(tmp_path):
    assert eval_options(config(tmp_path, "layers: [3]")).parts_given is True
    assert eval_options(config(tmp_path, "limit: 3")).parts_given is False
