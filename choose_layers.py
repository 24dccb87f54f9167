"""Chooses which of the teacher's layers and heads a hybrid keeps, by measurement: forward passes alone, before any
training.

    torchrun --standalone --nproc_per_node=4 choose_layers.py --preset llama-1b --budget 4 --head_budget 16

Prints the line `--layers ... --heads ...` for train_gpus.py, and writes choice.json, the report choice.md and the
picture choice.svg into a folder beside the student. The same command resumes a choice that was stopped.
"""

import sys

from processes.exits import answer_early, run_entry
from selection.options import ChooseArguments, parse_choose_args

if __name__ == "__main__":
    ARGS = answer_early(parse_choose_args)

import contextlib
import functools

from processes.ranks import check_launch, is_main_rank, process_groups
from selection.checks import Checked, check_choice, cost_of, planned_tokens
from selection.cost import GB
from selection.folder import taken
from selection.options import training_of
from selection.report import options_line
from selection.running import make_choice
from utils import setup_logging


def main(args: ChooseArguments | None = None) -> int:
    """Makes the choice, prints it, and returns the exit code. args: the command line's if not given."""
    args = args or parse_choose_args()
    check_launch()
    setup_logging(None, is_main_rank())
    checked = check_choice(args)
    if args.dry_run:
        if is_main_rank():
            print_plan(args, checked)
        return 0
    with process_groups(checked.device) as ranks:
        with taken(checked.folder) if ranks.is_main else contextlib.nullcontext():
            choice = make_choice(args, checked, ranks)
        if ranks.is_main:
            print(f"{checked.folder}: choice.md, choice.svg, choice.json\n{options_line(choice)}")
    return 0


def print_plan(args: ChooseArguments, checked: Checked) -> None:
    """Prints what the choice would cost."""
    cost = cost_of(args, checked.configs, checked.n_kept, None, planned_tokens(training_of(args.preset)))
    heads = f" and {args.head_budget} heads of others" if args.head_budget else ""
    print(f"Keeps {checked.n_kept} of {checked.configs[1].n_layer} layers{heads}; result in {checked.folder}")
    print(f"At most about {cost}")
    print(f"Both models, before what they share: {cost.model_bytes / GB:.1f} GB on each rank's device")
    print(f"Hidden states: {cost.state_bytes / GB:.2f} GB of each rank's host memory")


if __name__ == "__main__":
    sys.exit(run_entry(functools.partial(main, ARGS)))
