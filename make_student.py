"""Makes a student of a Llama, Mistral, Qwen2 or Qwen3: mixers computed in closed form from its attention and a little
text, everything else copied. train_gpus.py trains it then, with some of the teacher's layers put back.

    python make_student.py --teacher_model meta-llama/Llama-3.2-1B-Instruct --output students/llama-1b

It works on one layer at a time, on the CPU or a GPU. The same command resumes one that was stopped.
"""

import sys

from conversion.options import MakeArguments, parse_make_args
from processes.exits import answer_early, run_entry

if __name__ == "__main__":
    ARGS = answer_early(parse_make_args)

import functools
import logging
from pathlib import Path

from conversion.build import Recipe, build_student
from conversion.calibration import read_windows
from conversion.checks import check_conversion, converted_folder, warn_of_few_tokens
from conversion.gguf import convert_gguf, is_gguf
from conversion.plan import format_plan
from conversion.report import format_figures
from conversion.teacher_weights import TeacherWeights
from conversion.unfinished import check_output
from model_utils import get_tokenizer, locate_model
from processes.devices import checked_device
from text.encoding import check_tokenizer
from text.separators import choose_separator
from text.sources import SourceFlags, TextSource, is_part
from utils import setup_logging

logger = logging.getLogger("train")


def main(args: MakeArguments | None = None) -> int:
    """Makes the student, prints what it reached, and returns the exit code. args: the command line's if not given."""
    args = args or parse_make_args()
    setup_logging(None, is_main=True)
    device = checked_device("--device", args.device)
    configs = check_conversion(args)
    if args.dry_run:
        print(format_plan(args, *configs))
        return 0
    assert args.output is not None
    layers = tuple(sorted(args.layers))
    recipe = Recipe(args.init, args.d_state, args.ssm_bias, args.dtype, layers, args.seed, args.kept_heads)
    known = {"teacher": {"name": args.teacher_model}, **recipe.made_with(device)}
    check_output(Path(args.output), known)  # before a file is converted, or a text downloaded
    warn_of_few_tokens(args, configs[1])
    teacher = TeacherWeights(teacher_folder(args), "--teacher_model", args.teacher_model)
    tokenizer = get_tokenizer("--teacher_model", str(teacher.folder))
    check_tokenizer(tokenizer, "--teacher_model", teacher.config.vocab_size)
    tokens = (args.calibration_tokens, args.held_out_tokens)
    separator = choose_separator(args.document_separator, tokenizer)
    logger.info("each document ends with %s: %s", separator, separator.why)
    windows = read_windows(text_of(args), tokenizer, tokens, args.seq_length, args.seed, separator.token)
    figures = build_student(teacher, Path(args.output), tokenizer, windows, recipe, device)
    print(format_figures(figures))
    return 0


def teacher_folder(args: MakeArguments) -> str:
    """Returns where the teacher is; a GGUF file is converted to a folder beside the student first."""
    name = args.teacher_model
    if is_gguf(name):
        name = str(convert_gguf("--teacher_model", Path(name), converted_folder(args)))
    return locate_model("--teacher_model", name, args.local_files_only)


def text_of(args: MakeArguments) -> TextSource:
    """Returns the text of `--calibration`."""
    assert args.calibration is not None
    return TextSource(
        args.calibration,
        args.calibration_subset,
        args.calibration_split,
        args.calibration_revision,
        text_field=args.calibration_text_field,
        streaming=not is_part(args.calibration_split),
        local_files_only=args.local_files_only,
        flags=SourceFlags(
            name="--calibration",
            subset="--calibration_subset",
            split="--calibration_split",
            revision="--calibration_revision",
            text_field="--calibration_text_field",
            skip_bad_rows=None,
        ),
    )


if __name__ == "__main__":
    sys.exit(run_entry(functools.partial(main, ARGS)))
