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
    answer_early(parse_eval_args)

import gc
import logging
import platform
import time
from contextlib import nullcontext
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from evaluation import mmlu
from evaluation.checks import CheckedInputs, check_agreement, check_inputs
from evaluation.held_out import HeldOutText
from evaluation.partial_results import PartialResults, partial_folder, resumable
from evaluation.pieces import Piece, assemble, pieces_of, share_out
from evaluation.report import report_results
from evaluation.scoring import Scorer
from model_utils import DTYPES, apply_replacements, get_student_model, get_teacher_model
from processes.ranks import Ranks, is_main_rank, process_groups
from utils import setup_logging

logger = logging.getLogger("train")

TIMEOUT = timedelta(days=7)  # of collectives: a rank that is done may wait long for one with a long task
LOG_INTERVAL_S = 30.0  # between log lines about the progress, where no terminal shows a bar


def main() -> None:
    args = parse_eval_args()
    setup_logging(None, is_main_rank())
    inputs = check_inputs(args)
    with process_groups(inputs.device, TIMEOUT) as ranks:
        evaluate(args, inputs, ranks)


def evaluate(args: EvalArguments, inputs: CheckedInputs, ranks: Ranks) -> None:
    """Measures every model on all ranks together; the main rank writes the report."""
    check_agreement(inputs, ranks)
    output = None if args.output is None else Path(args.output)
    held_out = None if inputs.windows is None else HeldOutText(inputs.windows, inputs.device)
    pieces = pieces_of(args, inputs.questions, held_out, inputs.max_length)
    own = share_out(pieces, ranks.rank, ranks.world_size)
    with resumable(output, inputs.settings, args.resume) if ranks.is_main else nullcontext():
        ranks.maximum(0)  # a barrier: the main rank has prepared the folder before another rank reads it
        partial = PartialResults(None if output is None else partial_folder(output))
        measure_models(args, inputs, own, held_out, partial, ranks.is_main)
        found = {key: result for results in ranks.gather(partial.found) for key, result in results.items()}
        if ranks.is_main:
            results = {}
            for name in inputs.models:
                parts = {piece.name: found[name, piece.name] for piece in pieces}
                results[name] = assemble(parts, provenance(name, args, inputs))
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
        logger.info("%s: done in %.1f s", name, time.perf_counter() - started)
        del model, scorer  # before the next model is loaded
        gc.collect()
        torch.cuda.empty_cache()
    progress.close()


class Progress:
    """Shows how much of the work is done and how long the rest will take: a bar on a terminal, else log lines."""

    def __init__(self, cost: int, is_main: bool) -> None:
        self.cost, self.done, self.is_main = cost, 0, is_main
        self.bar = tqdm(
            total=cost,
            disable=not (is_main and sys.stderr.isatty()),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left",
        )
        self.began = self.logged = time.monotonic()

    def advance(self, model: str, piece: Piece) -> None:
        self.done += piece.cost
        self.bar.set_description_str(f"{model} {piece.name}")
        self.bar.update(piece.cost)
        now = time.monotonic()
        if self.is_main and self.bar.disable and now - self.logged > LOG_INTERVAL_S:
            self.logged = now
            minutes = (now - self.began) * (self.cost - self.done) / self.done / 60
            logger.info("%s: %d%%, about %.0f min left", model, 100 * self.done // self.cost, minutes)

    def close(self) -> None:
        self.bar.close()


def load_model(name: str, args: EvalArguments, inputs: CheckedInputs) -> PreTrainedModel:
    """Loads one of `teacher`, `student`, `hybrid` and `hybrid_ft`, in eval mode."""
    dtype, source = DTYPES[args.dtype], inputs.sources[name]
    if name == "teacher":
        return get_teacher_model(source.path, dtype, inputs.device)
    student = get_student_model(source.path, dtype, inputs.device)
    if name == "hybrid":
        assert source.layers is not None
        # The teacher is loaded into main memory, so that the device has to hold the student alone.
        teacher = get_teacher_model(inputs.sources["teacher"].path, dtype, torch.device("cpu"), with_head=False)
        apply_replacements(student, teacher, source.layers)
    return student.eval()


def provenance(name: str, args: EvalArguments, inputs: CheckedInputs) -> dict[str, Any]:
    """Returns what it takes to reproduce a model's results: sources, options, versions of packages."""
    packages = ["torch", "transformers", "datasets", *(["lm_eval"] if args.tasks else [])]
    config = {
        "which": name,
        "teacher_model": args.teacher_model,
        "student_model": args.student_model if name in ("student", "hybrid") else None,
        "ckpt": inputs.sources[name].path if name == "hybrid_ft" else None,
        "layers": inputs.sources[name].layers,
        "max_length": inputs.max_length,
        "batch_size": args.batch_size or "auto",
        "dtype": args.dtype,
        "device": str(inputs.device),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "limit": args.limit,
    }
    if args.mmlu:
        config |= {
            "mmlu_dir": args.mmlu_dir or mmlu.HUB_NAME,
            "num_fewshot": args.num_fewshot,
            "prompt": mmlu.PROMPT,
            "questions_sha256": mmlu.fingerprint(inputs.questions),
        }
    for kind, is_asked in {"held_out": args.held_out, "retrieval": args.retrieval, "tasks": args.tasks}.items():
        if is_asked:
            config |= {option: value for option, value in vars(args).items() if option.startswith(kind)}
    return config | ({"seed": args.seed} if args.retrieval else {})


if __name__ == "__main__":
    sys.exit(run_entry(main))
