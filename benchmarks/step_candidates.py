"""One rank's steps of each candidate of bench_step.py: the project's, and the plain loop's. TRL's trainers are in
step_trl.py.
"""

from typing import Any

import plain_loop
import torch
from bare_run import train_steps
from harness import Row
from step_case import STEPS, Case
from step_models import Recorder, batches_of, build_student, build_teacher, train_options
from torch import Tensor

from distillation.objective import Distillation, DistillationModel
from distillation.teacher import open_lane
from model_utils import prepare_student
from processes.ranks import Ranks, process_groups


def train(case: Case, candidate: str) -> Row:
    """Trains a candidate for `STEPS` steps on this rank. Returns seconds, bytes and losses."""
    recorder = Recorder()
    if candidate.startswith("trl"):
        import step_trl  # not installed where none of them runs

        step_trl.train(case, candidate, recorder)
    else:
        with process_groups(torch.device("cpu")) as ranks:
            if candidate == "plain loop":
                train_plain(case, recorder, ranks)
            else:
                train_ours(case, recorder, ranks, *candidate.split()[1:])
    return recorder.result()


def train_ours(case: Case, recorder: Recorder, ranks: Ranks, *more_options: str) -> None:
    """Trains by `train_gpus.distil`, as a run does."""
    args = train_options(case, *more_options)
    teacher = build_teacher(case, "cpu" if ranks.owns_teacher else "meta")
    head, lane = open_lane(
        teacher, args.teacher_signal, args.teacher_placement, case.vocab, ranks, args.teacher_prefetch or 0
    )
    student = build_student(case)
    prepare_student(student, args)
    model = DistillationModel(student, head, case.vocab, args)
    train_steps(
        args,
        batches_of(case, ranks, recorder),
        STEPS,
        Distillation(model, ranks.device),
        lane,
        ranks,
        RecorderLog(recorder),
    )
    lane.close()


class RecorderLog:
    """Hands the rows of a run to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def write(self, row: dict[str, Any]) -> None:
        self.recorder.step_done({name: row[name] for name in ("loss", "kl", "ce")})


def train_plain(case: Case, recorder: Recorder, ranks: Ranks) -> None:
    """Trains by the loop of the original design."""

    def after_step(loss: Tensor, kl: Tensor, ce: Tensor) -> None:
        recorder.step_done({"loss": loss.item(), "kl": kl.item(), "ce": ce.item()})

    teacher = build_teacher(case) if ranks.owns_teacher else None
    batches = batches_of(case, ranks, recorder)
    plain_loop.train(build_student(case), teacher, batches, train_options(case), after_step)
