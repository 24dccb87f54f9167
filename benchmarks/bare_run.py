"""Steps of `train_gpus.distil` without checkpoints, evaluations, requests to stop or files that stay. For benchmarks,
and for tests that measure a run.
"""

import dataclasses
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

from torch.nn.parallel import DistributedDataParallel

import train_gpus
from arguments import TrainArguments
from checkpointing.saver import Saver
from checkpointing.state import Progress
from distillation.teacher import Lane
from monitoring.evaluator import Evaluator
from processes.exits import StopRequest
from processes.ranks import Ranks
from text.batch import Batch
from training_utils import build_optimizer


class NoSaver(Saver):
    """Saves nothing."""

    def __init__(self) -> None:
        pass

    def is_due(self, progress: Progress) -> bool:
        return False

    def save(self, progress: Progress) -> None:
        pass

    def status(self) -> tuple[int, int]:
        return 0, 0

    def advance(self, busy: int, failed: int) -> None:
        pass

    def finish(self, progress: Progress, stop: StopRequest) -> None:
        pass


def train_steps(
    args: TrainArguments,
    batches: Iterator[Batch],
    n_steps: int,
    model: DistributedDataParallel,
    lane: Lane,
    ranks: Ranks,
    log: Any,
) -> None:
    """Trains for `n_steps` optimizer steps. `log` stands in for a RunLog: `distil` calls its `write(row)` after each
    step and its `flush_to_disk()` at the end.
    """
    with TemporaryDirectory() as folder:
        args = dataclasses.replace(args, output_dir=folder)
        stop = StopRequest(None)
        evaluator = Evaluator(args, None, None, ranks, model.module, lane, stop)  # has nothing to evaluate on
        learner = (model, build_optimizer(model, args), lane)
        code = train_gpus.distil(args, batches, n_steps, Progress(), *learner, ranks, log, NoSaver(), evaluator, stop)
    assert code == 0
