"""The work of an evaluation in pieces, to be shared out over ranks and done in any order: a subject of MMLU, a size of
the retrieval probe, some windows of held-out text, a task of lm-evaluation-harness. What the pieces of one model give,
`assemble` puts together.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import mmlu
import retrieval
from arguments import EvalArguments
from held_out import HeldOutSums, held_out_sums
from lm_eval_tasks import run_task
from losses import choose_chunk_tokens, shared_vocab
from results import aggregate
from scoring import Scorer

WINDOWS_PER_PIECE = 8
CHARACTERS_PER_TOKEN = 4  # about: what pieces cost is compared in characters
TASK_COST = 1_000_000  # of a task, of which nothing is known beforehand


@dataclass(frozen=True)
class Candidate:
    """A model to be measured."""

    name: str
    model: PreTrainedModel
    scorer: Scorer


@dataclass(frozen=True)
class Piece:
    name: str  # "<kind>-<what>", fit for a file's name
    cost: int  # beside the other pieces'
    measure: Callable[[Candidate], Any]  # what it gives is JSON

    @property
    def kind(self) -> str:
        return self.name.split("-")[0]


def pieces_of(
    args: EvalArguments, questions: list[mmlu.Question], held_out: "HeldOutText | None", max_length: int
) -> list[Piece]:
    pieces = []
    for subject in dict.fromkeys(question.subject for question in questions):
        pieces.append(_mmlu_piece(subject, [question for question in questions if question.subject == subject]))
    if held_out is not None:
        pieces += held_out.pieces()
    for length in args.retrieval_lengths if args.retrieval else []:
        for n_pairs in args.retrieval_pairs:
            pieces.append(_retrieval_piece(args, length, n_pairs, max_length))
    return [*pieces, *(_task_piece(name, args, max_length) for name in args.tasks)]


def share_out(pieces: list[Piece], rank: int, world_size: int) -> list[Piece]:
    """This rank's pieces: the most costly first, each goes to who has least."""
    loads, own = [0] * world_size, []
    for piece in sorted(pieces, key=lambda piece: -piece.cost):
        taker = loads.index(min(loads))
        loads[taker] += piece.cost
        if taker == rank:
            own.append(piece)
    return own


def assemble(found: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """One model's results, from those of its pieces by name, with its config among them."""
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
    if "held_out" in kinds:
        sums = [HeldOutSums(torch.tensor(values, dtype=torch.float64), True) for values in kinds["held_out"].values()]
        result["held_out"] = sum(sums[1:], start=sums[0]).figures(ce_weight=1.0, kl_weight=0.0)
        del result["held_out"]["loss"]  # which would be the cross entropy once more
    if "retrieval" in kinds:
        result["retrieval"] = list(kinds["retrieval"].values())
    if "task" in kinds:
        result["tasks"] = kinds["task"]
    result["config"] = config
    if predictions:
        result["predictions"] = [dataclasses.asdict(prediction) for prediction in predictions]
    return result


def _mmlu_piece(subject: str, questions: list[mmlu.Question]) -> Piece:
    def measure(candidate: Candidate) -> dict[str, Any]:
        scorer = candidate.scorer
        before = (scorer.tokens_run, scorer.tokens_plain)
        predictions = mmlu.answer(scorer, questions)
        tokens = {"run": scorer.tokens_run - before[0], "plain": scorer.tokens_plain - before[1]}
        return {"predictions": [dataclasses.asdict(prediction) for prediction in predictions], "tokens": tokens}

    prompts = [question.prompt for question in questions]
    shared = len(os.path.commonprefix(prompts))
    return Piece(f"mmlu-{subject}", shared + sum(len(prompt) - shared for prompt in prompts), measure)


def _retrieval_piece(args: EvalArguments, length: int, n_pairs: int, max_length: int) -> Piece:
    def measure(candidate: Candidate) -> dict[str, Any]:
        n_questions = args.retrieval_questions if length <= max_length else 0  # beyond it the context would be cut
        return retrieval.probe(candidate.scorer, length, n_pairs, n_questions, args.seed)

    n_contexts = args.retrieval_questions // retrieval.QUESTIONS_PER_CONTEXT
    return Piece(f"retrieval-{length}x{n_pairs}", n_contexts * length * CHARACTERS_PER_TOKEN, measure)


def _task_piece(name: str, args: EvalArguments, max_length: int) -> Piece:
    def measure(candidate: Candidate) -> dict[str, Any]:
        return run_task(
            name,
            candidate.model,
            candidate.scorer.tokenizer,
            args.batch_size,
            max_length,
            args.tasks_num_fewshot,
            args.limit,
            args.local_files_only,
        )

    return Piece(f"task-{name}", TASK_COST, measure)


class HeldOutText:
    """Windows of text and, in host memory, the teacher's last hidden states for them: so the teacher and the model that
    is compared with it need not be on the device together.
    """

    def __init__(self, windows: Tensor, device: torch.device) -> None:
        """windows (n, S + 1)"""
        self.windows, self.device = windows, device
        self.hidden: dict[int, Tensor] = {}  # by the piece's first window: (n, S, D_t) on the CPU
        self.head: Tensor | None = None  # (V_t, D_t) on the device

    def pieces(self) -> list[Piece]:
        cost = 2 * WINDOWS_PER_PIECE * self.windows.shape[1] * CHARACTERS_PER_TOKEN
        starts = range(0, len(self.windows), WINDOWS_PER_PIECE)
        return [Piece(f"held_out-{start}", cost, functools.partial(self._measure, start)) for start in starts]

    @torch.inference_mode()
    def ask_teacher(self, teacher: PreTrainedModel, pieces: list[Piece]) -> None:
        self.head = teacher.get_output_embeddings().weight.detach()
        for piece in pieces:
            start = int(piece.name.split("-")[1])
            self.hidden[start] = self._hidden(teacher, start).cpu()

    @torch.inference_mode()
    def _measure(self, start: int, candidate: Candidate) -> list[float]:
        head, hidden = candidate.model.get_output_embeddings(), self._hidden(candidate.model, start)  # (n, S, D)
        assert self.head is not None
        labels = self._windows(start)[:, 1:]  # (n, S)
        vocab = shared_vocab(len(head.weight), len(self.head))
        sums = held_out_sums(
            hidden,
            head.weight,
            head.bias,
            self.hidden[start].to(self.device),
            self.head[:vocab],
            labels,
            torch.ones_like(labels, dtype=torch.bool),
            vocab,
            temperature=1.0,
            chunk_tokens=choose_chunk_tokens(vocab, hidden.dtype, self.device),
        )
        return sums.values.tolist()

    def _windows(self, start: int) -> Tensor:
        return self.windows[start : start + WINDOWS_PER_PIECE].to(self.device)

    def _hidden(self, model: PreTrainedModel, start: int) -> Tensor:
        """(n, S, D), one window after another: what is held of each is its last layer alone."""
        inputs = self._windows(start)[:, :-1]
        return torch.cat([model.base_model(row[None], use_cache=False).last_hidden_state for row in inputs])
