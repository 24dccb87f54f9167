"""Command lines as text to options or to the error that refuses them."""

import pytest

from arguments import EvalArguments, TrainArguments, parse_eval_args, parse_train_args

PRODUCTION = (
    "--dtype bfloat16 --layers 14 16 17 30 --batch_size 2 --ce_weight 1.0 --kl_weight 0.1 --epochs 1 "
    "--max_steps 100000 --seq_length 1024 --freeze_mlp --freeze_replaced_layers --no_dataset_streaming "
    "--local_files_only --save_interval 1000 --wandb --wandb_project llamba-distill --wandb_run_name NAME "
    "--output_dir DIR"
)


def train(line: str = "") -> TrainArguments:
    return parse_train_args(line.split())


def evaluation(line: str = "") -> EvalArguments:
    return parse_eval_args(line.split())


def train_error(line: str) -> str:
    with pytest.raises(ValueError) as error:
        train(line)
    return str(error.value)


def eval_error(line: str) -> str:
    with pytest.raises(ValueError) as error:
        evaluation(line)
    return str(error.value)
