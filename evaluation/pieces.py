"""Divides an evaluation into pieces, which ranks share and may measure in any order: a subject of MMLU, a size of the
retrieval probe, some windows of held-out text, a task of lm-evaluation-harness. `assemble` puts the results of one
model's pieces together.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from arguments import EvalArguments
from evaluation import copying, mmlu, retrieval
from evaluation.held_out import WINDOWS_AT_ONCE, HeldOutSums, HeldOutText
from evaluation.lm_eval_tasks import run_task
from evaluation.scoring import Scorer
from evaluation.statistics import aggregate

CHARACTERS_PER_TOKEN = 4  # about; costs are in characters
TASK_COST = 1_000_000  # a guess: the length of a task is not known beforehand


@dataclass(frozen=True)
class Piece:
    """Holds a part of an evaluation that is measured as a whole."""

    name: str  # "<kind>-<what>"
    cost: int  # relative to other pieces'
    measure: Callable[[Scorer], Any]  # takes a model's scorer, returns JSON
    window: int | None = None  # of held-out text: the first of the piece's windows


def pieces_of(
    args: EvalArguments, questions: list[mmlu.Question], held_out: HeldOutText | None, max_length: int
) -> list[Piece]:
    """Returns the pieces of one model's evaluation, which are the same for every model."""
    pieces = []
    for subject in dict.fromkeys(question.subject for question in questions):
        pieces.append(_mmlu_piece(subject, [question for question in questions if question.subject == subject]))
    if held_out is not None:
        pieces += [_held_out_piece(held_out, start) for start in range(0, len(held_out.windows), WINDOWS_AT_ONCE)]
    for length in args.retrieval_lengths if args.retrieval else []:
        for n_pairs in args.retrieval_pairs:
            pieces.append(_retrieval_piece(args, length, n_pairs, max_length))
    if args.retrieval:
        pieces.append(_copying_piece(args.seed, max_length))
    return [*pieces, *(_task_piece(name, args, max_length) for name in args.tasks)]


def share_out(pieces: list[Piece], rank: int, world_size: int) -> list[Piece]:
    """Returns this rank's pieces, in their order. The most costly are assigned first, each to the least loaded rank."""
    loads, own = [0] * world_size, set()
    for piece in sorted(pieces, key=lambda piece: -piece.cost):
        taker = loads.index(min(loads))
        loads[taker] += piece.cost
        if taker == rank:
            own.add(piece.name)
    return [piece for piece in pieces if piece.name in own]


def assemble(found: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Returns one model's results from those of its pieces by name, and adds its config."""
    kinds: dict[str, dict[str, Any]] = {}
    for name, part in found.items():
        kind, what = name.split("-", 1)
        kinds.setdefault(kind, {})[what] = part
    result: dict[str, Any] = {}
    predictions = []
    if "mmlu" in kinds:
        parts = kinds["mmlu"].values()
        predictions = [mmlu.Prediction(**prediction) for part in parts for prediction in part["predictions"]]
        result |= aggregate(predictions)
        result["tokens"] = {key: sum(part["tokens"][key] for part in parts) for key in ("run", "plain")}
        if n_cut := sum(part.get("cut", 0) for part in parts):
            result["cut"] = n_cut
    if "held_out" in kinds:
        sums = [HeldOutSums(torch.tensor(values, dtype=torch.float64), True) for values in kinds["held_out"].values()]
        result["held_out"] = sum(sums[1:], start=sums[0]).means()
    if "retrieval" in kinds:
        result["retrieval"] = list(kinds["retrieval"].values())
    if "copying" in kinds:
        result["copying"] = kinds["copying"]["words"]
    if "task" in kinds:
        result["tasks"] = kinds["task"]
    result["config"] = config
    if predictions:
        result["predictions"] = [dataclasses.asdict(prediction) for prediction in predictions]
    return result


def _mmlu_piece(subject: str, questions: list[mmlu.Question]) -> Piece:
    def measure(scorer: Scorer) -> dict[str, Any]:
        before = (scorer.tokens_run, scorer.tokens_plain, scorer.n_cut)
        predictions = mmlu.answer(scorer, questions)
        tokens = {"run": scorer.tokens_run - before[0], "plain": scorer.tokens_plain - before[1]}
        shown = [dataclasses.asdict(prediction) for prediction in predictions]
        return {"predictions": shown, "tokens": tokens, "cut": scorer.n_cut - before[2]}

    prompts = [question.prompt for question in questions]
    shared = len(os.path.commonprefix(prompts))
    return Piece(f"mmlu-{subject}", shared + sum(len(prompt) - shared for prompt in prompts), measure)


def _held_out_piece(held_out: HeldOutText, start: int) -> Piece:
    def measure(scorer: Scorer) -> list[float]:
        return held_out.compare(scorer.model, start).values.tolist()

    cost = 2 * WINDOWS_AT_ONCE * held_out.windows.shape[1] * CHARACTERS_PER_TOKEN
    return Piece(f"held_out-{start}", cost, measure, window=start)


def _retrieval_piece(args: EvalArguments, length: int, n_pairs: int, max_length: int) -> Piece:
    def measure(scorer: Scorer) -> dict[str, Any]:
        n_questions = args.retrieval_questions if length <= max_length else 0  # longer contexts would be cut
        return retrieval.probe(scorer, length, n_pairs, n_questions, args.seed)

    n_contexts = -(-args.retrieval_questions // retrieval.QUESTIONS_PER_CONTEXT)
    cost = n_contexts * length * CHARACTERS_PER_TOKEN if length <= max_length else 1
    return Piece(f"retrieval-{length}x{n_pairs}", cost, measure)


def _copying_piece(seed: int, max_length: int) -> Piece:
    cost = copying.TEXTS * 2 * copying.WORDS * CHARACTERS_PER_TOKEN
    return Piece("copying-words", cost, lambda scorer: copying.probe(scorer, max_length, seed))


def _task_piece(name: str, args: EvalArguments, max_length: int) -> Piece:
    def measure(scorer: Scorer) -> dict[str, Any]:
        return run_task(
            name,
            scorer.model,
            scorer.tokenizer,
            args.batch_size,
            max_length,
            args.tasks_num_fewshot,
            args.limit,
            args.local_files_only,
        )

    return Piece(f"task-{name}", TASK_COST, measure)
