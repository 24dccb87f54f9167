"""Command lines to typed options: the project's own commands to exact values, switches, help, and what
argparse refuses.
"""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from arguments import EvalArguments, TrainArguments, parse_eval_args, parse_train_args
from inputs.options import options_of
from tests.parsing import PRODUCTION, eval_error, eval_options, train_error, train_options

ROOT = Path(__file__).parents[2]


# --- values --------------------------------------------------------------------------------------------------


PRODUCTION_OPTIONS = {
    "preset": "llamba-8b",
    "config": None,
    "seed": 0,
    "local_files_only": True,
    "teacher_model": "meta-llama/Llama-3.1-8B-Instruct",
    "student_model": "goombalab/Llamba-8B-untied-unaligned",
    "layers": [14, 16, 17, 30],
    "heads": [],
    "auto_layers": None,
    "auto_heads": None,
    "dtype": "bfloat16",
    "document_separator": "auto",
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
    "stage": "distil",
    "kl_weight": 0.1,
    "temperature": 1.0,
    "loss_chunk_tokens": None,
    "max_steps": 100_000,
    "epochs": 1,
    "grad_accumulation_steps": 1,
    "grad_accumulation_dtype": "float32",
    "gradient_exchange": "allreduce",
    "gradient_bits": 16,
    "max_lr": 1e-5,
    "min_lr": 1e-8,
    "copied_lr_factor": 1.0,
    "warmup_ratio": 0.01,
    "warmup_steps": None,
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
    "link_gb_per_s": None,
    "nodes": None,
    "plan_json": None,
}


def test_the_production_command():
    assert dataclasses.asdict(train_options(PRODUCTION)) == PRODUCTION_OPTIONS


def test_no_option_at_all_is_the_production_preset():
    args, production = train_options(), train_options(PRODUCTION)
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
    args = eval_options(line)
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
    assert eval_options(f"--batch_size {word}").batch_size == value


@pytest.mark.parametrize(
    "name,choices", [("wandb_mode", ["online", "offline", "disabled"]), ("dtype", ["bfloat16", "float16", "float32"])]
)
def test_every_choice_can_be_made(name, choices):
    assert [getattr(train_options(f"--{name} {choice}"), name) for choice in choices] == list(choices)


def test_evaluation_knows_whether_layers_were_given():
    args = eval_options()
    assert (args.layers, args.parts_given) == ([14, 16, 17, 30], False)
    assert eval_options("--layers 14 16 17 30").parts_given is True
    assert eval_options("--layers -1").parts_given is True
    assert eval_options("--heads 3:1").parts_given is True


def test_heads_are_named_with_commas_or_spaces():
    for words in ("13:18,15:11,13:2", "15:11 13:18 13:2,13:18", "15:11,13:2 13:18", "13:18, 15:11, 13:2"):
        args = train_options(f"--heads {words}")
        assert args == parse_train_args(["--heads", words])  # in quotes
        assert args.heads == ["13:2", "13:18", "15:11"] and args.kept_heads == {13: [2, 18], 15: [11]}
    assert train_options("--layers -1 --heads 1:0").takes_parts and train_options("--layers 1").takes_parts
    assert not train_options("--layers -1 --heads").takes_parts
    for text in ("13", "13:", "13:18:2", "13-18", "-1", "a:b", ",", "13:1e3", "auto:2,auto:3"):
        assert "expected heads as LAYER:HEAD" in train_error(f"--heads={text}")


def test_layers_that_are_yet_to_be_chosen_go_without_heads():
    message = train_error("--layers auto:3 --heads 1:0,2:1")
    assert "--layers auto:3 --heads 1:0,2:1: layers are chosen as if no heads were kept, maybe those" in message


def test_evaluation_has_no_option_for_what_was_given():
    assert "--parts_given" in eval_error("--parts_given")


@pytest.mark.parametrize("choice", ["teacher", "student", "hybrid", "hybrid_ft", "all"])
def test_every_model_can_be_scored(choice):
    assert eval_options(f"--which {choice}").which == [choice]


def test_lists_are_not_shared_between_parses():
    eval_options().which.append("student")
    assert eval_options().which == ["teacher"]


@pytest.mark.parametrize(
    ("line", "which"), [("", ["teacher"]), ("--ckpt C", ["hybrid_ft"]), ("--ckpt C --which all", ["all"])]
)
def test_a_checkpoint_is_what_is_scored_unless_which_says_more(line, which):
    assert eval_options(line).which == which


# --- layers and switches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["--layers -1", "--layers", "--layers -1 -2"])
def test_a_negative_index_means_no_layer(line):
    assert train_options(line).layers == []
    assert eval_options(line).layers == []


def test_a_negative_index_stands_alone():
    for message in (train_error("--layers -1 3"), eval_error("--layers -1 3")):
        assert "--layers -1 3: a negative index means no layer and stands alone" in message


def test_an_index_is_given_once():
    for message in (train_error("--layers 4 7 4"), eval_error("--layers 4 7 4")):
        assert "--layers 4 7 4: expected each index once" in message


SWITCHES = [f.name for f in dataclasses.fields(TrainArguments) if f.type is bool]


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_and_their_negations(name):
    assert getattr(train_options(f"--{name}"), name) is True
    assert getattr(train_options(f"--no_{name}"), name) is False
    assert getattr(train_options(f"--{name} --no_{name}"), name) is False
    assert getattr(train_options(f"--no_{name} --{name}"), name) is True


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


# --- what argparse refuses -----------------------------------------------------------------------------------


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
    assert sorted(shown) == sorted(options_of(cls))


def test_help_shows_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit):
        parse_train_args(["--help"])
    text = capsys.readouterr().out
    assert "temperature of the KL (default: 1.0)" in text
    assert "windows per rank and micro step (default: 2, by the preset)" in text
    assert "recompute activations in backward to save memory (default: off)" in text
    assert "--no_freeze_mlp" not in text


def test_help_shows_the_values_of_the_preset_that_is_named(capsys, monkeypatch):
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
    assert result.stdout.split() == ["arguments", "inputs", "paths", "yaml"]
