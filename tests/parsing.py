"""Parses command lines to options, or to the error that refuses them."""

from pathlib import Path

import pytest

from arguments import EvalArguments, TrainArguments, parse_eval_args, parse_train_args

PRODUCTION = (
    "--dtype bfloat16 --layers 14 16 17 30 --batch_size 2 --ce_weight 1.0 --kl_weight 0.1 --epochs 1 "
    "--max_steps 100000 --seq_length 1024 --freeze_mlp --freeze_replaced_layers --no_dataset_streaming "
    "--local_files_only --save_interval 1000 --wandb --wandb_project llamba-distill --wandb_run_name NAME "
    "--output_dir DIR"
)


def train_options(line: str = "") -> TrainArguments:
    return parse_train_args(line.split())


def options_in(folder: Path, *more: str) -> TrainArguments:
    """Returns the options of a run that writes into `folder`."""
    return parse_train_args(["--output_dir", str(folder), *more])


def eval_options(line: str = "") -> EvalArguments:
    return parse_eval_args(line.split())


def train_error(line: str) -> str:
    with pytest.raises(ValueError) as error:
        train_options(line)
    return str(error.value)


def eval_error(line: str) -> str:
    with pytest.raises(ValueError) as error:
        eval_options(line)
    return str(error.value)
