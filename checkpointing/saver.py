"""Saves checkpoints in the background: each rank copies what will change to the host, and a thread writes its part of
the checkpoint while training continues. Between micro steps the ranks agree when all parts are there, in a collective
that they pass through anyway. A save that fails on any rank is dropped on all, logged, and tried again.
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
from checkpointing.state import RunState, shard_tensors
from llamba import LlambaForCausalLM
from processes.exits import StopRequest
from processes.ranks import Ranks
from text.token_check import DamagedTokens
from utils import BackgroundThread, Stopwatch

logger = logging.getLogger("train")

LONGEST_WAIT = 64  # optimizer steps from a failed save to the next try
LAST_TRIES = 5  # at the end of a run, 1, 2, 4, ... seconds apart, before it obeys a request to stop
ROOM_WAIT_S = 6 * 3600.0  # for room to be made, at the end of a run that nobody asked to stop


class Saver:
    """Writes one checkpoint at a time. All ranks call `status` and `advance` after every micro step:
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
        """saved: micro step of the state that needs no checkpoint, because the run begins with it; -1 for none."""
        self.args, self.student, self.optimizer, self.tokenizer, self.ranks = args, student, optimizer, tokenizer, ranks
        self.output_dir = Path(args.output_dir)
        self.thread = BackgroundThread("saver")
        self.saved = saved  # micro step of the last checkpoint
        self.saving: RunState | None = None
        self.pending: Future | None = None  # of this rank: its part, or the publishing
        self.publishing = False
        self.failures = 0  # in a row
        self.retry_at = 0  # optimizer step
        self.stopwatch = Stopwatch()

    def is_due(self, state: RunState) -> bool:
        """Returns whether to save now: at multiples of the interval, and when a failed save has to be tried again."""
        if self.failures:
            return self.saving is None and state.step >= self.retry_at
        interval = self.args.save_interval
        return interval > 0 and state.micro_step // interval > max(self._reached, 0) // interval

    @property
    def _reached(self) -> int:
        return self.saved if self.saving is None else self.saving.micro_step

    def save(self, state: RunState) -> None:
        """Begins to save; weights and optimizer must be in `state`. Waits only for the copy to the host, and for an
        earlier save that is still being written.
        """
        if state.micro_step == self._reached:
            return
        self.stopwatch.lap()
        self._wait()
        self.saving = state
        try:
            write = self._prepare(state)
        except (MemoryError, RuntimeError) as error:  # no host memory for the copy: torch raises RuntimeError
            write = functools.partial(fail_with, error)
        if self.args.background_save:
            self.pending = self.thread.submit(write)
            stall = self.stopwatch.lap()
            logger.info("saving micro step %d; training stood still for %.2f s", state.micro_step, stall)
        else:
            self.pending = done_now(write)
            self._wait()

    def status(self) -> tuple[int, int]:
        """Returns whether this rank is busy with its part of the save, and whether that has failed."""
        if self.pending is None or not self.pending.done():
            return int(self.pending is not None), 0
        return 0, int(self.pending.exception() is not None)

    def advance(self, busy: int, failed: int) -> None:
        """Advances the save by what all ranks agree on, the maximum of their `status`; the same happens on all."""
        if self.saving is None or busy:
            return
        if failed:
            self._give_up(self.saving)
        elif not self.publishing:
            self.publishing = True
            self.pending = self.thread.submit(self._publish) if self.ranks.is_main else None
        else:
            self.saved, self.saving, self.pending = self.saving.micro_step, None, None
            self.publishing, self.failures = False, 0

    def finish(self, state: RunState, stop: StopRequest) -> None:
        """Completes the save under way and saves the last state. If that fails, waits for room on the disk, because the
        last steps exist in memory only. Raises OSError when it gives up.
        """
        began, n = time.monotonic(), 0
        while self._reached != state.micro_step or self.saving is not None:
            self.save(state)
            self._wait()
            if self.saved == state.micro_step:
                break
            n += 1
            (enough,) = self.ranks.maximum(int(stop.code > 0 or time.monotonic() - began > ROOM_WAIT_S))
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

    def _prepare(self, state: RunState) -> Callable[[], None]:
        """Copies everything that will change and returns the function that writes it."""
        ranks, folder = self.ranks, self._partial(state)
        weights = self.student.state_dict()
        shares = deal_weights(weights, ranks.world_size)
        trained = {name for name, parameter in self.student.named_parameters() if parameter.requires_grad}
        own = {name: weights[name] for name in shares[ranks.rank]}
        shard = shard_tensors(self.student, self.optimizer)
        shard |= {f"rng/{ranks.rank}/{kind}": value for kind, value in state.rng.items()}
        if self.args.background_save:
            own |= copy_to_host({name: tensor for name, tensor in own.items() if name in trained})
            shard = copy_to_host(shard)
        content = state.to_json(self.args, ranks.world_size)

        def write() -> None:
            position = None if state.position is None else state.position.to_json()
            write_part(folder, ranks.rank, ranks.world_size, own, shard, position)
            if ranks.is_main:
                write_common(folder, self.student, shares, self.tokenizer, content)

        return write

    def _partial(self, state: RunState) -> Path:
        """Returns the folder of this attempt. Each has its own: one rank may begin the next while another still removes
        the last.
        """
        return partial_dir(self.output_dir, state.micro_step, self.failures)

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

    def _give_up(self, state: RunState) -> None:
        partial = self._partial(state)
        self.failures += 1
        self.retry_at = state.step + min(2**self.failures, LONGEST_WAIT)
        if self.pending is not None and (error := self.pending.exception()) is not None:
            if isinstance(error, DamagedTokens):
                raise error
            logger.warning(
                "checkpoint of micro step %d could not be written (%s: %s); training continues and the save is "
                "repeated at step %d. Its newest checkpoint is that of micro step %d; make room, or make %s writable",
                state.micro_step,
                type(error).__name__,
                error,
                self.retry_at,
                self.saved,
                self.output_dir,
            )
        if self.ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        self.saving, self.pending, self.publishing = None, None, False


class NoSaver:
    """Replaces the Saver and never saves, for benchmarks and tests that measure the steps."""

    def is_due(self, state: RunState) -> bool:
        return False

    def save(self, state: RunState) -> None:
        pass

    def status(self) -> tuple[int, int]:
        return 0, 0

    def advance(self, busy: int, failed: int) -> None:
        pass

    def finish(self, state: RunState, stop: StopRequest) -> None:
        pass


def copy_to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies to pageable memory: torch rounds pinned memory up to powers of two and never returns it."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def fail_with(error: Exception) -> None:
    raise error


def done_now(work: Callable[[], None]) -> Future:
    future: Future = Future()
    try:
        work()
        future.set_result(None)
    except Exception as error:  # the caller sees it in the result, like a thread's
        future.set_exception(error)
    return future
