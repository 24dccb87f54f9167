"""Evaluation during training: figures on held-out text, and accuracy on some questions of MMLU, of the student as it is
after an optimizer step. The run continues as if there had been none: nothing is drawn from its data or its random
state, and the teacher answers through the same lane, between the batches of training.
"""

import dataclasses
import logging
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from arguments import TrainArguments
from distillation.objective import DistillationModel
from distillation.teacher import Lane, ask_ahead
from evaluation.held_out import HeldOutSums, held_out_sums, read_windows
from evaluation.mmlu import Question, answer, build_questions
from evaluation.mmlu_files import load_mmlu
from evaluation.scoring import Scorer
from monitoring.undisturbed import undisturbed
from processes.exits import StopRequest
from processes.ranks import Ranks
from text.batch import Batch
from text.overlap import check_not_trained_on
from text.sources import TextSource
from training_utils import to_device

logger = logging.getLogger("train")


@dataclass(frozen=True)
class Material:
    """Holds what every evaluation of a run is made with."""

    windows: Tensor  # (n, S + 1) int64
    subjects: list[list[Question]]  # of MMLU; none if it is not asked for


def read_material(args: TrainArguments, tokenizer: PreTrainedTokenizerBase, ranks: Ranks) -> Material | None:
    """Returns the material, the same on all ranks, each of which reads it; None for a run that does not evaluate.
    Raises ValueError.
    """
    if not args.eval_interval:
        return None
    subjects: list[list[Question]] = []
    if args.eval_mmlu_dir is not None:
        # Without examples: a question must not take more tokens than a window of training.
        subjects = [
            build_questions([subject], num_fewshot=0, limit=args.eval_mmlu_limit)
            for subject in load_mmlu(args.eval_mmlu_dir, flag="--eval_mmlu_dir")
        ]
    held_out = TextSource.for_evaluation_in_training(args)
    check_not_trained_on(held_out, TextSource.for_training(args), "this run")
    windows = read_windows(held_out, tokenizer, args.eval_windows, args.seq_length, args.document_separator)
    material = Material(windows, subjects)
    _check_same_on_all_ranks(material, ranks)
    return material


def _check_same_on_all_ranks(material: Material, ranks: Ranks) -> None:
    """Raises ValueError if nodes have read different files: all ranks have to evaluate as many batches."""
    if not ranks.all_have(material.windows.numpy().tobytes() + repr(material.subjects).encode()):
        raise ValueError(
            "--eval_interval: the held-out text or the questions are not the same on all nodes; expected the same "
            "files on each"
        )


def share_of_windows(windows: Tensor, batch_size: int, rank: int, world_size: int) -> list[Batch]:
    """Returns batches r, r + W, r + 2W, ... of the windows (n, S + 1). The k-th of all batches does not depend on the
    number of ranks. All ranks get as many batches, and all are full: what is missing is masked.
    """
    n_batches = -(-len(windows) // (batch_size * world_size)) * world_size
    padded = windows.new_zeros(n_batches * batch_size, windows.shape[1])  # (N, S + 1)
    padded[: len(windows)] = windows
    is_real = torch.arange(len(padded)) < len(windows)  # (N,)
    share = []
    for k in range(rank, n_batches, world_size):
        rows = slice(k * batch_size, (k + 1) * batch_size)
        batch = Batch.from_windows(padded[rows])
        share.append(dataclasses.replace(batch, loss_mask=batch.loss_mask & is_real[rows, None]))
    return share


class Evaluator:
    """Evaluates a student after every `--eval_interval` optimizer steps and after the last. The figures do not depend
    on the number of ranks: sums are kept by batch, and by subject, until those of all ranks are there.
    """

    def __init__(
        self,
        args: TrainArguments,
        material: Material | None,
        tokenizer: PreTrainedTokenizerBase,
        ranks: Ranks,
        model: DistillationModel,
        lane: Lane,
        stop: StopRequest,
    ) -> None:
        self.args, self.tokenizer, self.ranks, self.model = args, tokenizer, ranks, model
        self.lane, self.stop = lane, stop
        self.batches: list[Batch] = []
        self.subjects: list[list[Question]] = []
        if material is not None:
            self.batches = share_of_windows(material.windows, args.batch_size, ranks.rank, ranks.world_size)
            self.subjects = material.subjects

    def is_due(self, step: int, total_steps: int) -> bool:
        """Returns whether the student is to be evaluated after optimizer step `step`."""
        interval = self.args.eval_interval
        return interval > 0 and (step % interval == 0 or step == total_steps)

    def evaluate(self) -> dict[str, float] | None:
        """Returns the figures by name, the same on all ranks, or None if the run was asked to stop meanwhile: it must
        not be kept from that.
        """
        began = time.perf_counter()
        with undisturbed(self.model.student, self.args.compile):
            sums = self._sums_of_text()
            counts = None if sums is None else self._counts_of_mmlu()
        self.lane.waits.take()  # else they would count as waits of training
        if sums is None or counts is None:
            return None
        figures = sums.figures(self.args.ce_weight, self.args.kl_weight)
        if self.subjects:
            right, asked = counts.tolist()
            figures["mmlu"] = right / asked
        return {**figures, "seconds": time.perf_counter() - began}

    def add_to(self, row: dict[str, Any], total_steps: int) -> None:
        """Evaluates, if it is due, into the row of an optimizer step."""
        if self.is_due(row["step"], total_steps) and (figures := self.evaluate()) is not None:
            row["eval"] = figures

    def _sums_of_text(self) -> HeldOutSums | None:
        model, device, world_size = self.model, self.ranks.device, self.ranks.world_size
        assert model.chunk_tokens is not None  # settled before the first step
        by_batch = torch.zeros(len(self.batches) * world_size, 4, dtype=torch.float64)
        asked_ahead = ask_ahead(self.batches, self.lane)
        for i, (batch, asked) in enumerate(asked_ahead):
            if self._is_asked_to_stop():
                return None
            batch, signal = to_device(batch, device), asked.result()  # (B, S, D_t) or (B, S, vocab)
            sums = held_out_sums(model.loss_inputs(batch, signal), self.args.temperature, model.chunk_tokens)
            by_batch[i * world_size + self.ranks.rank] = sums.values
        return HeldOutSums(self.ranks.total(by_batch).sum(dim=0), with_teacher=self.args.has_teacher)

    def _counts_of_mmlu(self) -> Tensor | None:
        """Returns the numbers of right answers and of all: (2,). Each rank takes every W-th subject, with no more
        windows and tokens at a time than in training. Log-likelihoods that are not finite give NaN; they do not end the
        run, which may recover.
        """
        by_subject = torch.zeros(len(self.subjects), 2, dtype=torch.float64)
        args, scorer = self.args, None
        for first in range(0, len(self.subjects), self.ranks.world_size):
            if self._is_asked_to_stop():
                return None
            own = first + self.ranks.rank
            if own >= len(self.subjects):
                continue
            right = float("nan")
            try:
                student = self.model.student
                scorer = scorer or Scorer(student, self.tokenizer, self.ranks.device, args.batch_size, args.seq_length)
                right = sum(given.prediction == given.answer for given in answer(scorer, self.subjects[own]))
            except ValueError as error:
                logger.warning("evaluation: no accuracy on MMLU (%s)", error)
            by_subject[own] = torch.tensor([right, len(self.subjects[own])])
        return self.ranks.total(by_subject).sum(dim=0)

    def _is_asked_to_stop(self) -> bool:
        (code,) = self.ranks.maximum(self.stop.code)
        return code > 0
