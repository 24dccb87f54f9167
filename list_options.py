"""Prints the page docs/options.md, made from the options of every entry:

python list_options.py > docs/options.md
"""

import sys

from arguments import EvalArguments, TrainArguments
from conversion.options import MakeArguments
from inputs.options import free_options
from inputs.options_page import options_page
from processes.exits import run_entry
from selection.options import ChooseArguments

ENTRIES = {
    "train_gpus.py": (TrainArguments, "train"),
    "eval_mmlu_hybrid.py": (EvalArguments, "eval"),
    "make_student.py": (MakeArguments, "common"),
    "choose_layers.py": (ChooseArguments, "common"),
}


def main() -> None:
    print(options_page(ENTRIES, free_options(TrainArguments)), end="")


if __name__ == "__main__":
    sys.exit(run_entry(main))
