"""Score the teacher, the student, the untrained hybrid and a trained one, side by side: on MMLU, and if asked on
held-out text, on key-value retrieval and on any task of lm-evaluation-harness.

    torchrun --standalone --nproc_per_node=4 eval_mmlu_hybrid.py --which all --ckpt runs/llamba-8b/latest \\
        --output runs/llamba-8b/eval.json

`hybrid` is the student with --layers replaced by the teacher's, before any training; `hybrid_ft` is --ckpt, which knows
its own layers. The ranks share the work out; each loads one model after another, so a GPU needs memory for one. All
models see the same prompts: made by the teacher's tokenizer, cut to --max_length, or else to the teacher's context.
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
from evaluation.checks import Plan, check, check_agreement
from evaluation.held_out import HeldOutText
from evaluation.partial_results import PartialResults, kept_in, partial_folder
from evaluation.pieces import Piece, assemble, pieces_of, share_out
from evaluation.report import write_report
from evaluation.scoring import Scorer
from model_utils import apply_replacements, get_student_model, get_teacher_model
from processes.ranks import Ranks, is_main_rank, process_groups
from utils import setup_logging

logger = logging.getLogger("train")

PATIENCE = timedelta(days=7)  # a rank that is done may have to wait for one with a long task
QUIET_S = 30.0  # between lines about the progress, where no terminal shows a bar


def main() -> None:
    args = parse_eval_args()
    setup_logging(None, is_main_rank())
    plan = check(args)
    with process_groups(plan.device, PATIENCE) as ranks:
        run(args, plan, ranks)


def run(args: EvalArguments, plan: Plan, ranks: Ranks) -> None:
    check_agreement(plan, ranks)
    output = None if args.output is None else Path(args.output)
    held_out = None if plan.windows is None else HeldOutText(plan.windows, plan.device)
    pieces = pieces_of(args, plan.questions, held_out, plan.max_length)
    own = share_out(pieces, ranks.rank, ranks.world_size)
    with kept_in(output, plan.settings, args.resume) if ranks.is_main else nullcontext():
        ranks.maximum(0)  # so that nobody looks into the folder before it is as it shall be
        partial = PartialResults(None if output is None else partial_folder(output))
        measure(args, plan, own, held_out, partial, ranks.is_main)
        found = {key: result for results in ranks.gather(partial.found) for key, result in results.items()}
        if ranks.is_main:
            results = {}
            for name in plan.models:
                parts = {piece.name: found[name, piece.name] for piece in pieces}
                results[name] = assemble(parts, describe(name, args, plan))
            write_report(results, output)


def measure(
    args: EvalArguments,
    plan: Plan,
    own: list[Piece],
    held_out: HeldOutText | None,
    partial: PartialResults,
    is_main: bool,
) -> None:
    """Does this rank's pieces for all models, but for what is there already."""
    missing = {name: [piece for piece in own if (name, piece.name) not in partial] for name in plan.models}
    progress = Progress(sum(piece.cost for todo in missing.values() for piece in todo), is_main)
    windows = {piece.window for todo in missing.values() for piece in todo if piece.window is not None}
    names = plan.models
    if windows:  # the others are compared with what the teacher says
        names = ["teacher", *(name for name in names if name != "teacher")]
    for name in names:
        todo = missing.get(name, [])
        if not todo and not (windows and name == "teacher"):
            continue
        started = time.perf_counter()
        model = load(name, args, plan)
        if held_out is not None and name == "teacher":
            held_out.ask_teacher(model, sorted(windows))
        scorer = Scorer(model, plan.tokenizer, plan.device, args.batch_size, plan.max_length)
        for piece in todo:
            partial.put(name, piece.name, piece.measure(scorer))
            progress.advance(name, piece)
        logger.info("%s: done in %.1f s", name, time.perf_counter() - started)
        del model, scorer  # before the next one comes
        gc.collect()
        torch.cuda.empty_cache()
    progress.close()


class Progress:
    """How far the work is and how long the rest will take: a bar on a terminal, else a line now and then."""

    def __init__(self, cost: int, is_main: bool) -> None:
        self.cost, self.done, self.is_main = cost, 0, is_main
        self.bar = tqdm(
            total=cost,
            disable=not (is_main and sys.stderr.isatty()),
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed} so far, {remaining} left",
        )
        self.began = self.told = time.monotonic()

    def advance(self, model: str, piece: Piece) -> None:
        self.done += piece.cost
        self.bar.set_description_str(f"{model} {piece.name}")
        self.bar.update(piece.cost)
        now = time.monotonic()
        if self.is_main and self.bar.disable and now - self.told > QUIET_S:
            self.told = now
            minutes = (now - self.began) * (self.cost - self.done) / self.done / 60
            logger.info("%s: %d%%, about %.0f min left", model, 100 * self.done // self.cost, minutes)

    def close(self) -> None:
        self.bar.close()


# Models


def load(name: str, args: EvalArguments, plan: Plan) -> PreTrainedModel:
    dtype, source = getattr(torch, args.dtype), plan.sources[name]
    if name == "teacher":
        return get_teacher_model(source.path, dtype, plan.device)
    student = get_student_model(source.path, dtype, plan.device)
    if name == "hybrid":
        assert source.layers is not None
        # The lender waits in main memory: the device holds the student alone.
        lender = get_teacher_model(plan.sources["teacher"].path, dtype, torch.device("cpu"), with_head=False)
        apply_replacements(student, lender, source.layers)
    return student.eval()


def describe(name: str, args: EvalArguments, plan: Plan) -> dict[str, Any]:
    """What it takes to get these numbers again."""
    packages = ["torch", "transformers", "datasets", *(["lm_eval"] if args.tasks else [])]
    config = {
        "which": name,
        "teacher_model": args.teacher_model,
        "student_model": args.student_model if name in ("student", "hybrid") else None,
        "ckpt": plan.sources[name].path if name == "hybrid_ft" else None,
        "layers": plan.sources[name].layers,
        "max_length": plan.max_length,
        "batch_size": args.batch_size or "auto",
        "dtype": args.dtype,
        "device": str(plan.device),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "limit": args.limit,
    }
    if args.mmlu:
        config |= {
            "mmlu_dir": args.mmlu_dir or mmlu.HUB_NAME,
            "num_fewshot": args.num_fewshot,
            "prompt": mmlu.PROMPT,
            "questions_sha256": mmlu.fingerprint(plan.questions),
        }
    for kind, is_asked in {"held_out": args.held_out, "retrieval": args.retrieval, "tasks": args.tasks}.items():
        if is_asked:
            config |= {option: value for option, value in vars(args).items() if option.startswith(kind)}
    return config | ({"seed": args.seed} if args.retrieval else {})


if __name__ == "__main__":
    sys.exit(run_entry(main))
