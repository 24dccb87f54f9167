"""Saving while training goes on: a rank copies what will change to the host and a thread writes its part of the
checkpoint. The ranks agree between micro steps, in a collective that nobody has to wait in, when all parts are there.
A save that fails anywhere is given up everywhere, told, and tried again; the run goes on.
"""

import functools
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from transformers import PreTrainedTokenizerBase

from arguments import TrainArguments
from checkpointing.files import (
    deal_weights,
    keep_newest,
    partial_dir,
    point_latest_to,
    publish,
    write_common,
    write_part,
)
from checkpointing.state import Progress, shard_tensors
from llamba import LlambaForCausalLM
from processes.exits import StopRequest
from processes.ranks import Ranks
from utils import BackgroundThread, Stopwatch

logger = logging.getLogger("train")

LONGEST_WAIT = 64  # optimizer steps from a failed save to the next try
LAST_TRIES = 5  # at the end of a run, 1, 2, 4, ... seconds apart, before a request to stop is given in to
PATIENCE_S = 6 * 3600.0  # for room to be made, at the end of a run that nobody asked to stop


class Saver:
    """One save at a time. `status` and `advance` are called by all ranks after every micro step:
    `saver.advance(*ranks.maximum(*saver.status()))`.
    """

    def __init__(
        self,
        args: TrainArguments,
        student: LlambaForCausalLM,
        optimizer: ZeroRedundancyOptimizer,
        tokenizer: PreTrainedTokenizerBase,
        ranks: Ranks,
        saved: int,
    ) -> None:
        """saved: micro step of the checkpoint that the run goes on from; -1 for none."""
        self.args, self.student, self.optimizer, self.tokenizer, self.ranks = args, student, optimizer, tokenizer, ranks
        self.output_dir = Path(args.output_dir)
        self.thread = BackgroundThread("saver")
        self.saved = saved  # micro step of the last checkpoint
        self.saving: Progress | None = None
        self.job: Future | None = None  # of this rank: its part, or the publishing
        self.publishing = False
        self.failures = 0  # in a row
        self.retry_at = 0  # optimizer step
        self.stopwatch = Stopwatch()

    def is_due(self, progress: Progress) -> bool:
        """At every multiple of the interval, and when a save that failed is to be tried again."""
        if self.failures:
            return self.saving is None and progress.step >= self.retry_at
        interval = self.args.save_interval
        return interval > 0 and progress.micro_step // interval > max(self._reached, 0) // interval

    @property
    def _reached(self) -> int:
        return self.saved if self.saving is None else self.saving.micro_step

    def save(self, progress: Progress) -> None:
        """Begins; `progress` must be where weights and optimizer are. Stands still for the copy only, and for an
        earlier save that is still under way.
        """
        if progress.micro_step == self._reached:
            return
        self.stopwatch.lap()
        self._wait()
        self.saving = progress
        try:
            write = self._prepare(progress)
        except (MemoryError, RuntimeError) as error:  # no room for the copy; torch's word for it is RuntimeError
            write = functools.partial(fail_with, error)
        if self.args.background_save:
            self.job = self.thread.submit(write)
            stall = self.stopwatch.lap()
            logger.info("saving micro step %d; training stood still for %.2f s", progress.micro_step, stall)
        else:
            self.job = done_now(write)
            self._wait()

    def status(self) -> tuple[int, int]:
        """Whether this rank is busy with its part of the save, and whether it failed."""
        if self.job is None or not self.job.done():
            return int(self.job is not None), 0
        return 0, int(self.job.exception() is not None)

    def advance(self, busy: int, failed: int) -> None:
        """What all ranks together say: the highest of their `status`. All ranks take the same way through here."""
        if self.saving is None or busy:
            return
        if failed:
            self._give_up(self.saving)
        elif not self.publishing:
            self.publishing = True
            self.job = self.thread.submit(self._publish) if self.ranks.is_main else None
        else:
            self.saved, self.saving, self.job = self.saving.micro_step, None, None
            self.publishing, self.failures = False, 0

    def finish(self, progress: Progress, stop: StopRequest) -> None:
        """Ends what is under way and saves where the run ends. What was trained is in memory alone: where it cannot be
        saved, this waits for somebody to make room. Raises OSError when it gives up.
        """
        began, n = time.monotonic(), 0
        while self._reached != progress.micro_step or self.saving is not None:
            self.save(progress)
            self._wait()
            if self.saved == progress.micro_step:
                break
            n += 1
            (enough,) = self.ranks.maximum(int(stop.code > 0 or time.monotonic() - began > PATIENCE_S))
            if enough and n >= LAST_TRIES:
                raise OSError(
                    f"--output_dir {self.output_dir}: the last state could not be saved in {n} tries (see above); the "
                    f"newest checkpoint is that of micro step {self.saved}"
                )
            logger.warning("the run has ended, and waits for room to save its last state in %s", self.output_dir)
            time.sleep(min(2 ** (n - 1), 60))
        self.thread.close()

    def _wait(self) -> None:
        while self.saving is not None:
            self.advance(*self.ranks.maximum(*self.status()))
            time.sleep(0.02)

    def _prepare(self, progress: Progress) -> Callable[[], None]:
        """Everything that changes is copied now; what writes it is returned."""
        ranks, folder = self.ranks, self._partial(progress)
        weights = self.student.state_dict()
        shares = deal_weights(weights, ranks.world_size)
        trained = {name for name, parameter in self.student.named_parameters() if parameter.requires_grad}
        own = {name: weights[name] for name in shares[ranks.rank]}
        shard = shard_tensors(self.student, self.optimizer)
        shard |= {f"rng/{ranks.rank}/{kind}": state for kind, state in progress.rng.items()}
        if self.args.background_save:
            own |= copy_to_host({name: tensor for name, tensor in own.items() if name in trained})
            shard = copy_to_host(shard)
        state = progress.to_json(self.args, ranks.world_size)

        def write() -> None:
            position = None if progress.position is None else progress.position.to_json()
            write_part(folder, ranks.rank, ranks.world_size, own, shard, position)
            if ranks.is_main:
                write_common(folder, self.student, shares, self.tokenizer, state)

        return write

    def _partial(self, progress: Progress) -> Path:
        """Each try has its own: one rank may begin the next while another still clears the last away."""
        return partial_dir(self.output_dir, progress.micro_step, self.failures)

    def _publish(self) -> None:
        assert self.saving is not None
        path = publish(self._partial(self.saving), self.output_dir, self.saving.micro_step)
        logger.info("saved %s, %.1f s after it was begun", path, self.stopwatch.lap())
        try:
            point_latest_to(path)
            if self.args.save_total_limit is not None:
                keep_newest(self.output_dir, self.args.save_total_limit)
        except OSError as error:  # the checkpoint is there all the same
            logger.warning("after saving %s: %s", path, error)

    def _give_up(self, progress: Progress) -> None:
        partial = self._partial(progress)
        self.failures += 1
        self.retry_at = progress.step + min(2**self.failures, LONGEST_WAIT)
        if self.job is not None and (error := self.job.exception()) is not None:
            logger.warning(
                "checkpoint of micro step %d could not be written (%s: %s); the run goes on and tries again at step "
                "%d. Its newest checkpoint is that of micro step %d; make room, or make %s writable",
                progress.micro_step,
                type(error).__name__,
                error,
                self.retry_at,
                self.saved,
                self.output_dir,
            )
        if self.ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        self.saving, self.job, self.publishing = None, None, False


def copy_to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Into plain memory: torch's pinned one is handed out in powers of two, up to twice of what is needed, and is never
    given back.
    """
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def fail_with(error: Exception) -> None:
    raise error


def done_now(job: Callable[[], None]) -> Future:
    future: Future = Future()
    try:
        job()
        future.set_result(None)
    except Exception as error:  # raised or told where the result is asked for, as a thread's would be
        future.set_exception(error)
    return future
