"""Steps of `train_gpus.distil` with nothing around them: no checkpoints, no evaluations, no request to stop, no files.
For benchmarks, and for tests that measure a run.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import train_gpus
from arguments import TrainArguments
from checkpointing.saver import NoSaver
from checkpointing.state import RunState
from distillation.teacher import Lane
from monitoring.watchers import metrics_row
from processes.exits import StopRequest
from processes.ranks import Ranks
from text.batch import Batch
from training_utils import Job, Meter, Objective, Update, build_learner
from utils import TimedIterator


class RowsOnly:
    """Stands where a run has its Watchers, and hands each row to `log.write(row)`."""

    def __init__(self, log: Any) -> None:
        self.log = log

    def after_step(self, state: RunState, update: Update, seconds: float, meter: Meter, batch: Batch) -> None:
        self.log.write(metrics_row(state, update, seconds))

    def flush_to_disk(self) -> None:
        pass


def train_steps(
    args: TrainArguments,
    batches: Iterator[Batch],
    n_steps: int,
    objective: Objective,
    lane: Lane,
    ranks: Ranks,
    log: Any,
) -> None:
    """Trains the student of `objective` for n_steps optimizer steps; `log.write(row)` gets the row of each."""
    job = Job(args, ranks, StopRequest(None))
    learner = build_learner(job, objective, lane, n_steps)
    state = train_gpus.begin(job, learner, RunState(step=0), NoSaver())
    timed = TimedIterator(itertools.islice(batches, n_steps * args.grad_accumulation_steps))
    state = train_gpus.distil(job, timed, learner, state, NoSaver(), RowsOnly(log))
    assert state.step == n_steps
