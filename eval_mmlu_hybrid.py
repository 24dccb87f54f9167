"""Scores the teacher, the student, the untrained hybrid and a trained one, side by side: on MMLU and, with options, on
held-out text, on key-value retrieval and on any task of lm-evaluation-harness.

    torchrun --standalone --nproc_per_node=4 eval_mmlu_hybrid.py --which all --ckpt runs/llamba-8b/latest \\
        --output runs/llamba-8b/eval.json

`hybrid` is the student with --layers replaced by the teacher's, before any training. `hybrid_ft` is --ckpt, whose
config says which of its layers are the teacher's. The ranks divide the work between them. Each loads one model after
another, so a GPU needs memory for one. All models are given the same prompts: encoded by the teacher's tokenizer and
cut to --max_length, by default the length of the teacher's context.
"""

import sys

from arguments import EvalArguments, parse_eval_args
from processes.exits import answer_early, run_entry

if __name__ == "__main__":  # --help and options that cannot be used are answered before torch is imported
    ARGS = answer_early(parse_eval_args)

import functools
import gc
import logging
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch

from evaluation.checks import CheckedInputs, check_agreement, check_inputs
from evaluation.held_out import HeldOutText
from evaluation.models import load_model, provenance
from evaluation.partial_results import PartialResults, partial_folder, resumable
from evaluation.pieces import Piece, assemble, pieces_of, share_out
from evaluation.progress import Progress
from evaluation.report import report_results
from evaluation.scoring import Scorer
from processes.ranks import Ranks, check_launch, is_main_rank, process_groups
from utils import setup_logging

logger = logging.getLogger("train")

AGREEMENT_TIMEOUT = timedelta(days=7)  # of collectives: a rank that is done may wait long for one with a long task


def main(args: EvalArguments | None = None) -> None:
    """Checks everything, then scores the models. args: the command line's if not given."""
    args = args or parse_eval_args()
    check_launch()
    setup_logging(None, is_main_rank())
    inputs = check_inputs(args)
    with process_groups(inputs.device, AGREEMENT_TIMEOUT) as ranks:
        evaluate(args, inputs, ranks)


def evaluate(args: EvalArguments, inputs: CheckedInputs, ranks: Ranks) -> None:
    """Measures every model on all ranks together; the main rank writes the report."""
    check_agreement(inputs, ranks)
    output = None if args.output is None else Path(args.output)
    held_out = None if inputs.windows is None else HeldOutText(inputs.windows, inputs.device)
    pieces = pieces_of(args, inputs.questions, held_out, inputs.max_length)
    own = share_out(pieces, ranks.rank, ranks.world_size)
    preparing = resumable(output, inputs.settings, resume=args.resume, overwrite=args.overwrite)
    with preparing if ranks.is_main else nullcontext() as claim:
        ranks.maximum(0)  # a barrier: the main rank has prepared the folder before another rank reads it
        partial = PartialResults(None if output is None else partial_folder(output), claim)
        measure_models(args, inputs, own, held_out, partial, ranks.is_main)
        found = {key: result for results in ranks.gather(partial.found) for key, result in results.items()}
        if ranks.is_main:
            results = {}
            for name in inputs.models:
                parts = {piece.name: found[name, piece.name] for piece in pieces}
                results[name] = assemble(parts, provenance(name, args, inputs))
            partial.check_own()
            report_results(results, output)


def measure_models(
    args: EvalArguments,
    inputs: CheckedInputs,
    own: list[Piece],
    held_out: HeldOutText | None,
    partial: PartialResults,
    is_main: bool,
) -> None:
    """Measures this rank's pieces for all models, except those whose results are in `partial` already."""
    missing = {name: [piece for piece in own if (name, piece.name) not in partial] for name in inputs.models}
    progress = Progress(sum(piece.cost for todo in missing.values() for piece in todo), is_main)
    windows = {piece.window for todo in missing.values() for piece in todo if piece.window is not None}
    names = inputs.models
    if windows:  # the teacher comes first: the others are compared with its hidden states
        names = ["teacher", *(name for name in names if name != "teacher")]
    for name in names:
        todo = missing.get(name, [])
        if not todo and not (windows and name == "teacher"):
            continue
        started = time.perf_counter()
        model = load_model(name, args, inputs)
        if held_out is not None and name == "teacher":
            held_out.ask_teacher(model, sorted(windows))
        scorer = Scorer(model, inputs.tokenizer, inputs.device, args.batch_size, inputs.max_length)
        for piece in todo:
            partial.put(name, piece.name, piece.measure(scorer))
            progress.advance(name, piece)
        if scorer.n_cut:
            logger.warning(
                "%s: %d prompts are longer than %d tokens (--max_length) and lose their start",
                *(name, scorer.n_cut, inputs.max_length),
            )
        logger.info("%s: done in %.1f s", name, time.perf_counter() - started)
        del model, scorer  # before the next model is loaded
        gc.collect()
        torch.cuda.empty_cache()
    progress.close()


if __name__ == "__main__":
    sys.exit(run_entry(functools.partial(main, ARGS)))
