"""Command lines to typed options: the project's own commands to exact values, presets under and over them, and
every mistake as one ValueError that names flag, value and remedy.
"""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from arguments import (
    EvalArguments,
    TrainArguments,
    free_options,
    kept_options,
    parse_eval_args,
    parse_train_args,
)
from inputs import options

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path.parent.name for path in options.PRESETS.glob("*/preset.json"))
PRODUCTION = (
    "--dtype bfloat16 --layers 14 16 17 30 --batch_size 2 --ce_weight 1.0 --kl_weight 0.1 --epochs 1 "
    "--max_steps 100000 --seq_length 1024 --freeze_mlp --freeze_replaced_layers --no_dataset_streaming "
    "--local_files_only --save_interval 1000 --wandb --wandb_project llamba-distill --wandb_run_name NAME "
    "--output_dir DIR"
)


@pytest.fixture
def preset(tmp_path, monkeypatch):
    """Writes a preset of a test's own, in the place of those that are shipped."""
    monkeypatch.setattr(options, "PRESETS", tmp_path)

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


def train(line=""):
    return parse_train_args(line.split())


def train_error(line):
    with pytest.raises(ValueError) as error:
        train(line)
    return str(error.value)


def eval_error(line):
    with pytest.raises(ValueError) as error:
        parse_eval_args(line.split())
    return str(error.value)


# --- values --------------------------------------------------------------------------------------------------


def test_the_production_command():
    assert dataclasses.asdict(train(PRODUCTION)) == {
        "preset": "llamba-8b",
        "config": None,
        "seed": 0,
        "local_files_only": True,
        "teacher_model": "meta-llama/Llama-3.1-8B-Instruct",
        "student_model": "goombalab/Llamba-8B-untied-unaligned",
        "layers": [14, 16, 17, 30],
        "dtype": "bfloat16",
        "teacher_device": None,
        "teacher_signal": "hidden",
        "teacher_placement": "dedicated",
        "teacher_prefetch": None,
        "freeze_mlp": True,
        "freeze_replaced_layers": True,
        "gradient_checkpointing": False,
        "checkpoint_blocks": None,
        "compile": False,
        "dataset_name": "HuggingFaceFW/fineweb-edu",
        "dataset_subset": "CC-MAIN-2014-49",
        "dataset_split": "train",
        "dataset_revision": None,
        "dataset_text_field": "text",
        "dataset_streaming": False,
        "dataset_cache_dir": None,
        "dataset_workers": 0,
        "skip_bad_rows": False,
        "shuffle_buffer": 10_000,
        "seq_length": 1024,
        "batch_size": 2,
        "ce_weight": 1.0,
        "kl_weight": 0.1,
        "temperature": 1.0,
        "loss_chunk_tokens": None,
        "max_steps": 100_000,
        "epochs": 1,
        "grad_accumulation_steps": 1,
        "max_lr": 1e-5,
        "min_lr": 1e-8,
        "warmup_ratio": 0.01,
        "decay_ratio": 0.1,
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "master_weights": True,
        "max_bad_steps": 5,
        "resume": None,
        "resume_step": 0,
        "time_limit": None,
        "eval_interval": 0,
        "eval_dataset_name": None,
        "eval_dataset_subset": None,
        "eval_dataset_split": None,
        "eval_windows": 64,
        "eval_mmlu_dir": None,
        "eval_mmlu_limit": 5,
        "output_dir": "DIR",
        "save_interval": 1000,
        "save_total_limit": None,
        "background_save": True,
        "health_interval": 100,
        "layer_map_interval": 0,
        "log_interval": 10,
        "log_file": None,
        "tensorboard": False,
        "wandb": True,
        "wandb_project": "llamba-distill",
        "wandb_run_name": "NAME",
        "wandb_entity": None,
        "wandb_mode": None,
        "dry_run": False,
        "gpus": None,
        "gpu_gb": None,
        "tflops": None,
        "nodes": None,
        "plan_json": None,
    }


def test_no_option_at_all_is_the_production_preset():
    args, production = train(), train(PRODUCTION)
    for name in (
        "teacher_model",
        "student_model",
        "layers",
        "dtype",
        "dataset_name",
        "dataset_subset",
        "seq_length",
    ):
        assert getattr(args, name) == getattr(production, name), name
    assert (args.freeze_mlp, args.freeze_replaced_layers, args.dataset_streaming, args.wandb) == (
        False,
        False,
        True,
        False,
    )


def test_the_command_line_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_gpus.py", "--batch_size", "7"])
    assert parse_train_args().batch_size == 7


def test_evaluation():
    line = "--which student hybrid_ft --ckpt C --layers 14 30 --mmlu_dir M --num_fewshot 0 --limit 9 --output F"
    args = parse_eval_args(line.split())
    assert (args.which, args.ckpt, args.layers, args.mmlu_dir) == (["student", "hybrid_ft"], "C", [14, 30], "M")
    assert (args.num_fewshot, args.limit, args.output, args.batch_size) == (0, 9, "F", None)
    assert (args.subjects, args.max_length, args.device, args.overwrite) == (None, None, None, False)
    assert (args.mmlu, args.tasks, args.held_out, args.retrieval, args.resume) == (True, [], None, False, False)


def test_tasks_are_named_with_commas_or_spaces():
    assert parse_eval_args(["--tasks", "hellaswag,arc_challenge", "gsm8k"]).tasks == [
        "hellaswag",
        "arc_challenge",
        "gsm8k",
    ]


@pytest.mark.parametrize(("word", "value"), [("auto", None), ("1", 1), ("64", 64)])
def test_a_batch_size_is_a_number_or_auto(word, value):
    assert parse_eval_args(["--batch_size", word]).batch_size == value


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--batch_size many", "'many': expected a whole number, or auto"),
        ("--batch_size 0", "--batch_size 0: expected at least 1"),
        ("--held_out_windows 0", "--held_out_windows 0: expected at least 1"),
        ("--retrieval_pairs 4 1", "--retrieval_pairs 1: expected 2 to 900"),
        ("--retrieval_pairs 901", "--retrieval_pairs 901: expected 2 to 900"),
        ("--retrieval_lengths 1", "--retrieval_lengths 1: expected at least 2"),
        ("--tasks_num_fewshot -1", "--tasks_num_fewshot -1: expected at least 0"),
        ("--no_mmlu", "--no_mmlu: nothing is left to measure"),
        ("--resume", "--resume: resumes from the results beside --output"),
        ("--resume --overwrite --output F", "--resume --overwrite: the one keeps"),
    ],
)
def test_an_evaluation_that_cannot_be_says_why(line, expected):
    assert expected in eval_error(line)


@pytest.mark.parametrize(
    "name,choices", [("wandb_mode", ["online", "offline", "disabled"]), ("dtype", ["bfloat16", "float16", "float32"])]
)
def test_every_choice_can_be_made(name, choices):
    assert [getattr(train(f"--{name} {choice}"), name) for choice in choices] == list(choices)


def test_evaluation_knows_whether_layers_stood_on_the_command_line():
    args = parse_eval_args([])
    assert (args.layers, args.layers_given) == ([14, 16, 17, 30], False)
    assert parse_eval_args(["--layers", "14", "16", "17", "30"]).layers_given is True
    assert parse_eval_args(["--layers", "-1"]).layers_given is True
    assert "--layers_given" in eval_error("--layers_given")


@pytest.mark.parametrize("choice", ["teacher", "student", "hybrid", "hybrid_ft", "all"])
def test_every_model_can_be_scored(choice):
    assert parse_eval_args(["--which", choice]).which == [choice]


def test_lists_are_not_shared_between_parses():
    parse_eval_args([]).which.append("student")
    assert parse_eval_args([]).which == ["teacher"]


# --- presets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_presets_give_what_has_no_default(name):
    for args in (train(f"--preset {name}"), parse_eval_args(["--preset", name])):
        for field in dataclasses.fields(args):
            assert getattr(args, field.name) is not dataclasses.MISSING, field.name


def test_presets_lie_over_the_defaults_and_under_the_command_line(preset):
    preset(common={"seed": 5}, train={"max_lr": 0.5, "freeze_mlp": True, "log_interval": 3})
    args = train("--preset mine --log_interval 4")
    assert (args.seed, args.max_lr, args.freeze_mlp, args.log_interval) == (5, 0.5, True, 4)
    assert args.epochs == TrainArguments.epochs == 1
    assert train("--preset mine --no_freeze_mlp").freeze_mlp is False


def test_sections_are_for_their_own_entry(preset):
    preset(train={"batch_size": 3}, evaluation={"batch_size": 5, "num_fewshot": 2})
    args = parse_eval_args(["--preset", "mine"])
    assert (args.batch_size, args.num_fewshot) == (5, 2)
    assert train("--preset mine").batch_size == 3


def test_dot_slash_is_the_presets_folder(preset, tmp_path):
    preset(common={"teacher_model": "./teacher"}, train={"dataset_name": "./text/a.jsonl", "output_dir": "runs/x"})
    args = train("--preset mine --student_model ./student")
    assert args.teacher_model == str(tmp_path / "mine" / "teacher")
    assert args.dataset_name == str(tmp_path / "mine" / "text" / "a.jsonl")
    assert args.output_dir == "runs/x"
    assert args.student_model == "./student"  # the user's own: relative to where they stand


def test_another_dataset_leaves_the_presets_dataset_options_behind(preset):
    preset(train={"dataset_subset": "part", "dataset_split": "half", "dataset_streaming": False})
    own = train("--preset mine")
    assert (own.dataset_name, own.dataset_subset, own.dataset_split, own.dataset_streaming) == (
        "D",
        "part",
        "half",
        False,
    )
    other = train("--preset mine --dataset_name other --dataset_split test")
    assert (other.dataset_name, other.dataset_subset, other.dataset_split, other.dataset_streaming) == (
        "other",
        None,
        "test",
        False,  # not what the data is, but how it is read
    )
    assert (other.seq_length, other.batch_size) == (8, 3)


def test_another_dataset_leaves_the_presets_held_out_text_behind(preset):
    preset(train={"eval_dataset_name": "H", "eval_dataset_split": "half", "eval_interval": 7})
    own = train("--preset mine")
    assert (own.eval_interval, own.held_out_text()) == (7, ("H", None, "half"))
    other = train("--preset mine --eval_dataset_name other --eval_dataset_subset part")
    assert other.held_out_text() == ("other", "part", "train")
    message = train_error("--preset mine --dataset_name other")
    assert "--eval_interval 7: 'other', split 'train', is trained on" in message


def test_without_evaluations_a_presets_held_out_text_is_none(preset):
    preset(train={"eval_dataset_name": "H", "eval_interval": 7})
    assert train("--preset mine --eval_interval 0").eval_dataset_name is None


# --- files of options ----------------------------------------------------------------------------------------


def config(tmp_path, text):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    return f"--config {file}"


def test_a_file_lies_over_the_preset_and_under_the_command_line(tmp_path):
    line = config(tmp_path, "preset: tiny\nmax_lr: 1e-4\nbatch_size: 7\nlayers: [2, 3]\nfreeze_mlp: true\n")
    args = train(f"{line} --batch_size 9 --no_freeze_mlp")
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
    assert getattr(train(config(tmp_path, text)), option) == value


@pytest.mark.parametrize(
    "text,problem",
    [
        ("seq_lenght: 3", "there is no option 'seq_lenght'; did you mean seq_length?"),
        ("qqq: 3", "there is no option 'qqq'; --help lists"),
        ("config: x.yaml", "there is no option 'config'"),
        ("seq_length: 3\nseq_length: 4", "seq_length is given twice"),
        ("- 3", "expected lines such as `seq_length: 1024`"),
        ("a: [", "cannot be read"),
        ("seq_length: 3.5", "invalid int value: '3.5'"),
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


def test_another_dataset_leaves_that_of_a_file_behind(tmp_path):
    text = "dataset_name: A\ndataset_subset: part\ndataset_text_field: body\ndataset_streaming: false\n"
    args = train(config(tmp_path, text) + " --dataset_name B")
    assert (args.dataset_name, args.dataset_subset, args.dataset_text_field) == ("B", None, "text")
    assert args.dataset_streaming is False


def test_evaluations_of_a_file_can_be_turned_off(tmp_path):
    line = config(tmp_path, "eval_interval: 5\neval_dataset_name: H\neval_mmlu_dir: M\n")
    assert train(line).eval_dataset_name == "H"
    off = train(f"{line} --eval_interval 0")
    assert (off.eval_dataset_name, off.eval_mmlu_dir) == (None, None)
    assert "give --eval_interval" in train_error(config(tmp_path, "eval_dataset_name: H\n"))


@pytest.mark.parametrize("line", [PRODUCTION, "--preset tiny --eval_interval 5 --max_lr 3e-4", "--layers -1"])
def test_what_a_run_writes_down_repeats_it(tmp_path, line):
    args = train(line)
    again = train(config(tmp_path, options.as_yaml(args)))
    assert {**vars(again), "config": None} == vars(args)
    assert train(config(tmp_path, options.as_yaml(args)) + " --seed 5").seed == 5


def test_layers_in_a_file_count_as_given(tmp_path):
    assert parse_eval_args(config(tmp_path, "layers: [3]").split()).layers_given is True
    assert parse_eval_args(config(tmp_path, "limit: 3").split()).layers_given is False


# --- mistakes in presets -------------------------------------------------------------------------------------


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


# --- layers and switches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["--layers -1", "--layers", "--layers -1 -2"])
def test_a_negative_index_means_no_layer(line):
    assert train(line).layers == []
    assert parse_eval_args(line.split()).layers == []


def test_a_negative_index_stands_alone():
    for message in (train_error("--layers -1 3"), eval_error("--layers -1 3")):
        assert "--layers -1 3: a negative index means no layer and stands alone" in message


def test_an_index_stands_once():
    for message in (train_error("--layers 4 7 4"), eval_error("--layers 4 7 4")):
        assert "--layers 4 7 4: expected each index once" in message


SWITCHES = [f.name for f in dataclasses.fields(TrainArguments) if f.type is bool]


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_and_their_negations(name):
    assert getattr(train(f"--{name}"), name) is True
    assert getattr(train(f"--no_{name}"), name) is False
    assert getattr(train(f"--{name} --no_{name}"), name) is False
    assert getattr(train(f"--no_{name} --{name}"), name) is True


def test_which_options_are_switches():
    assert set(SWITCHES) == {
        "local_files_only",
        "freeze_mlp",
        "freeze_replaced_layers",
        "gradient_checkpointing",
        "compile",
        "dataset_streaming",
        "skip_bad_rows",
        "master_weights",
        "background_save",
        "wandb",
        "dry_run",
        "tensorboard",
    }


# --- mistakes ------------------------------------------------------------------------------------------------

BOUNDS = [
    *((f"--{name} 0", "expected at least 1") for name in ("seq_length", "batch_size", "max_steps", "epochs")),
    *((f"--{name} 0", "expected at least 1") for name in ("log_interval", "grad_accumulation_steps")),
    *((f"--{name} 0", "expected at least 1") for name in ("max_bad_steps", "save_total_limit")),
    *((f"--{name} 0", "expected at least 1") for name in ("eval_windows", "eval_mmlu_limit")),
    *((f"--{name} -1", "expected at least 0") for name in ("health_interval", "eval_interval")),
    *((f"--time_limit {value}", "expected minutes, more than 0") for value in ("0.0", "-5.0", "nan", "inf")),
    *((f"--{name} -1", "expected at least 0") for name in ("shuffle_buffer", "dataset_workers", "save_interval")),
    ("--resume_step -1", "expected at least 0"),
    *((f"--{name} -0.5", "expected at least 0") for name in ("ce_weight", "kl_weight", "max_lr", "min_lr")),
    *((f"--{name} -0.5", "expected at least 0") for name in ("weight_decay", "grad_clip")),
    *((f"--{name} nan", "expected at least 0") for name in ("ce_weight", "max_lr", "weight_decay", "grad_clip")),
    ("--temperature 0.0", "expected a number above 0"),
    ("--temperature -1.0", "expected a number above 0"),
    ("--temperature nan", "expected a number above 0"),
    ("--min_lr 0.2", "expected at most --max_lr 1e-05"),
    ("--warmup_ratio -0.1 --decay_ratio 0.1", "expected parts of the run"),
    ("--warmup_ratio 0.1 --decay_ratio -0.1", "expected parts of the run"),
    ("--warmup_ratio 0.6 --decay_ratio 0.5", "together at most 1"),
    ("--warmup_ratio nan --decay_ratio 0.1", "expected parts of the run"),
]


@pytest.mark.parametrize("line,remedy", BOUNDS)
def test_bounds_name_flag_value_and_remedy(line, remedy):
    message = train_error(line)
    assert f"{line}: " in message
    assert remedy in message


@pytest.mark.parametrize(
    "line",
    [
        "--save_interval 0 --resume_step 0 --shuffle_buffer 0 --grad_clip 0 --weight_decay 0",
        "--ce_weight 0 --kl_weight 1",
        "--ce_weight 1 --kl_weight 0",
        "--warmup_ratio 0.5 --decay_ratio 0.5",
        "--warmup_ratio 0 --decay_ratio 0",
        "--min_lr 0.1 --max_lr 0.1",
        "--grad_accumulation_steps 4 --save_interval 8 --resume_step 4",
        "--seq_length 1 --batch_size 1 --max_steps 1 --epochs 1 --log_interval 1",
        "--max_bad_steps 1 --save_total_limit 1 --health_interval 0 --time_limit 0.5",
        "--time_limit 0.001",
    ],
)
def test_the_bounds_themselves_are_allowed(line):
    flag, value, *_ = line.split()
    assert getattr(train(line), flag.removeprefix("--")) == float(value)


def test_an_empty_loss():
    assert "--ce_weight 0 --kl_weight 0: the loss is empty" in train_error("--ce_weight 0 --kl_weight 0")


@pytest.mark.parametrize("name", ["save_interval", "resume_step"])
def test_checkpoints_hold_whole_optimizer_steps(name):
    message = train_error(f"--grad_accumulation_steps 4 --save_interval 4 --{name} 6")
    assert f"--{name} 6: expected a multiple of --grad_accumulation_steps 4" in message


@pytest.mark.parametrize("name", ["auto", "runs/mine/checkpoint-30"])
def test_a_run_goes_on_by_its_checkpoint_or_by_a_step_of_ours(name):
    assert train(f"--resume {name}").resume == name
    assert train("--resume_step 4").resume is None
    message = train_error(f"--resume {name} --resume_step 4")
    assert f"--resume {name} --resume_step 4: " in message and "leave --resume_step out" in message
    assert train(f"--resume {name} --resume_step 0").resume == name  # which is to say nothing


@pytest.mark.parametrize(
    "name,value",
    [("dataset_name", "F"), ("dataset_subset", "F"), ("dataset_split", "test"), ("mmlu_dir", "F")],
)
def test_what_evaluations_are_made_on_is_of_no_use_without_them(name, value):
    assert f"--eval_{name} {value}: " in train_error(f"--eval_{name} {value}")
    if name == "mmlu_dir":
        name, value = "dataset_name", "other"
    assert getattr(train(f"--eval_interval 5 --eval_{name} {value}"), f"eval_{name}") == value


HUB = "--dataset_name D --dataset_subset C"


@pytest.mark.parametrize(
    "line",
    [
        HUB,
        f"{HUB} --eval_dataset_name D --eval_dataset_subset C",
        f"{HUB} --dataset_split test --eval_dataset_split test",
        f"{HUB} --eval_dataset_split train[99%:]",
        f"{HUB} --dataset_split train[:99%] --eval_dataset_split train",
        f"{HUB} --dataset_split test+train[:99%] --eval_dataset_split train[99%:]+test",
        f"{HUB} --dataset_split all --eval_dataset_split test",
        "--dataset_name a.jsonl --eval_dataset_name ./a.jsonl",
        f"--dataset_name a.jsonl --eval_dataset_name {Path.cwd() / 'a.jsonl'}",
    ],
)
def test_text_that_is_trained_on_is_not_held_out(line):
    message = train_error(f"{line} --eval_interval 5")
    assert "--eval_interval 5: " in message and "is trained on" in message and "--eval_dataset_name FILE" in message


@pytest.mark.parametrize(
    "line,text",
    [
        (f"{HUB} --dataset_split train[:99%] --eval_dataset_split train[99%:]", ("D", "C", "train[99%:]")),
        (f"{HUB} --eval_dataset_split test", ("D", "C", "test")),
        (f"{HUB} --eval_dataset_subset B", ("D", "B", "train")),
        (f"{HUB} --eval_dataset_name D --eval_dataset_split test", ("D", "C", "test")),
        (f"{HUB} --eval_dataset_name E", ("E", None, "train")),
    ],
)
def test_where_held_out_text_comes_from(line, text):
    assert train(f"{line} --eval_interval 5").held_out_text() == text


OF_A_RUN = {"seed", "layers", "dtype", "freeze_mlp", "freeze_replaced_layers", "master_weights", "seq_length"}
OF_A_RUN |= {"dataset_name", "dataset_subset", "dataset_split", "dataset_revision", "dataset_text_field"}
OF_A_RUN |= {"dataset_streaming"}


def test_what_a_resumed_run_must_keep():
    assert kept_options(train("--dataset_streaming")) == OF_A_RUN | {"shuffle_buffer", "batch_size"}
    assert kept_options(train("--no_dataset_streaming")) == OF_A_RUN | {"skip_bad_rows"}


def test_what_a_resumed_run_may_change_without_a_warning():
    free = free_options()
    assert {"preset", "config", "local_files_only", "student_model", "dataset_cache_dir", "time_limit"} <= free
    assert {"resume", "resume_step", "wandb", "save_interval", "plan_json"} <= free
    assert not free & {*OF_A_RUN, "shuffle_buffer", "skip_bad_rows", "max_lr", "teacher_model", "eval_interval"}


@pytest.mark.parametrize("line", ["--num_fewshot -1", "--num_fewshot 6"])
def test_examples_of_the_evaluation_are_bounded(line):
    assert f"{line}: expected 0 to 5" in eval_error(line)
    assert [parse_eval_args(["--num_fewshot", n]).num_fewshot for n in ("0", "5")] == [0, 5]


@pytest.mark.parametrize("line", ["--batch_size 0", "--limit 0", "--max_length 0"])
def test_bounds_of_the_evaluation(line):
    assert f"{line}: expected at least 1" in eval_error(line)


def test_all_problems_are_in_one_error():
    lines = train_error("--batch_size 0 --temperature 0 --layers 3 3 --min_lr 1").split("\n")
    assert lines[0] == "these options cannot be used:"
    assert [line.split()[0] for line in lines[1:]] == ["--batch_size", "--temperature", "--layers", "--min_lr"]


@pytest.mark.parametrize(
    "line,word",
    [
        ("--batch_size two", "--batch_size"),
        ("--batch_size 1.5", "--batch_size"),
        ("--batch_size", "--batch_size"),
        ("--layers one", "--layers"),
        ("--dtype int8", "bfloat16"),
        ("--teacher_signal loud", "hidden"),
        ("--wandb_mode quiet", "offline"),
        ("--nonsense 1", "--nonsense"),
        ("stray", "stray"),
        ("--batch 2", "--batch"),  # abbreviations
        ("--layer 2", "--layer"),
        ("--freeze", "--freeze"),
    ],
)
def test_what_argparse_refuses_is_a_value_error(line, word):
    message = train_error(line)
    assert word in message and message.endswith("; see --help")


def test_an_unknown_model_to_score():
    assert "hybrid_ft" in eval_error("--which gpt")


# --- help and imports ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls,parse", [(TrainArguments, parse_train_args), (EvalArguments, parse_eval_args)])
def test_help_shows_every_option_once(cls, parse, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    shown = re.findall(r"^  --(\w+)", capsys.readouterr().out, flags=re.MULTILINE)
    assert sorted(shown) == sorted(field.name for field in dataclasses.fields(cls) if field.metadata)


def test_help_tells_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit):
        parse_train_args(["--help"])
    text = capsys.readouterr().out
    assert "temperature of the KL (default: 1.0)" in text
    assert "windows per rank and micro step (default: 2, by the preset)" in text
    assert "recompute activations in backward to save memory (default: off)" in text
    assert "--no_freeze_mlp" not in text


def test_help_tells_the_values_of_the_preset_that_is_named(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parse_train_args(["--preset", "tiny", "--help"])
    assert "windows per rank and micro step (default: 4, by the preset)" in capsys.readouterr().out


def test_nothing_heavy_is_imported():
    code = (
        "import sys; before = set(sys.modules); import arguments; "
        "arguments.parse_train_args([]); arguments.parse_eval_args([]); "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "new = {name for name in new - set(sys.stdlib_module_names) if name[0] != '_' and 'cython' not in name}; "
        "print(*sorted(new))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["arguments", "inputs", "yaml"]
