"""Saves checkpoints in the background: each rank copies what will change to the host, and a thread writes its part of
the checkpoint while training continues. Between micro steps the ranks agree when all parts are there, in a collective
that they pass through anyway. A save that fails on any rank is dropped on all, logged once, and tried again.
"""

import functools
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from arguments import TrainArguments
from checkpointing.files import deal_weights, partial_dir, publish, write_common, write_part
from checkpointing.host_copy import copy_to_host
from checkpointing.housekeeping import LINK, keep_newest, point_latest_to
from checkpointing.state import RunState, shard_tensors
from checkpointing.write_errors import may_pass, only_logged
from distillation.exchange import Exchange
from llamba import LlambaForCausalLM
from processes.exits import StopRequest
from processes.ranks import Ranks
from text.token_check import DamagedTokens
from utils import BackgroundThread, Stopwatch, format_duration

logger = logging.getLogger("train")

LONGEST_WAIT = 64  # optimizer steps from a failed save to the next try
LAST_TRIES = 5  # at the end of a run, 1, 2, 4, ... seconds apart, before it obeys a request to stop
# At the end of a run that nobody asked to stop: for room to be made, and for what no room cures, such as a permission.
ROOM_WAIT_S, REPAIR_WAIT_S = 6 * 3600.0, 600.0


class Saver:
    """Writes one checkpoint at a time. All ranks call `status` and `advance` after every micro step:
    `saver.advance(*ranks.maximum(*saver.status()))`.
    """

    def __init__(
        self,
        args: TrainArguments,
        student: LlambaForCausalLM,
        exchange: Exchange,
        tokenizer: PreTrainedTokenizerBase,
        ranks: Ranks,
        saved: int,
    ) -> None:
        """saved: micro step of the state that needs no checkpoint, because the run begins with it; -1 for none."""
        self.args, self.student, self.exchange, self.tokenizer, self.ranks = args, student, exchange, tokenizer, ranks
        self.output_dir = Path(args.output_dir)
        self.thread = BackgroundThread("saver")
        self.saved = saved  # micro step of the last checkpoint
        self.saving: RunState | None = None
        self.pending: Future | None = None  # of this rank: its part, or the publishing
        self.publishing = False
        self.failures = 0  # in a row
        self.lasts = False  # whether the last failure was of a kind that lasts until its cause is corrected
        self.is_last = False  # whether the run has ended, and only its last state has to be saved
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
        standstill = Stopwatch()
        self.wait()
        self.stopwatch.lap()
        self.saving = state
        try:
            write = self._prepare(state)
        except (MemoryError, RuntimeError) as error:  # no host memory for the copy: torch raises RuntimeError
            write = functools.partial(fail_with, error)
        if self.args.background_save:
            self.pending = self.thread.submit(write)
            text = "saving micro step %d; training stood still for %.2f s"
            logger.info(text, state.micro_step, standstill.lap())
        else:
            self.pending = done_now(write)
            self.wait()

    def status(self) -> tuple[int, int]:
        """Returns whether this rank is busy with its part of the save, and whether that has failed: 1 for a reason that
        may pass, 2 for one that lasts until somebody corrects it.
        """
        if self.pending is None or not self.pending.done():
            return int(self.pending is not None), 0
        error = self.pending.exception()
        return 0, 0 if error is None else 1 if may_pass(error) else 2

    def advance(self, busy: int, failed: int) -> None:
        """Advances the save by what all ranks agree on, the maximum of their `status`; the same happens on all. Raises
        ValueError, on rank 0, if the first checkpoint of a new run cannot be written for a reason that lasts.
        """
        if self.saving is None or busy:
            return
        if failed:
            self.lasts = failed == 2
            self._give_up(self.saving)
        elif not self.publishing:
            self.publishing = True
            self.pending = self.thread.submit(self._publish) if self.ranks.is_main else None
        else:
            self.saved, self.saving, self.pending = self.saving.micro_step, None, None
            self.publishing, self.failures = False, 0

    def finish(self, state: RunState, stop: StopRequest) -> None:
        """Completes the save under way and saves the last state, which exists in memory only. If that fails, waits for
        room on the disk, or less long for what lasts. Raises OSError when it gives up.
        """
        began, n = time.monotonic(), 0
        self.is_last = True
        self.wait()
        while self.saved != state.micro_step:
            self.save(state)
            self.wait()
            if self.saved == state.micro_step:
                break
            n += 1
            late = time.monotonic() - began > (REPAIR_WAIT_S if self.lasts else ROOM_WAIT_S)
            (enough,) = self.ranks.maximum(int(stop.code > 0 or late))
            if enough and n >= LAST_TRIES:
                raise OSError(
                    f"--output_dir {self.output_dir}: the last state could not be saved in {n} tries (see above); "
                    f"{self._newest}"
                )
            time.sleep(min(2 ** (n - 1), 60))
        self.thread.close()

    def wait(self) -> None:
        """Waits until the save under way, if there is one, has succeeded or failed."""
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
        shard = shard_tensors(self.student, self.exchange)
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
        with only_logged(f"{self.output_dir}/{LINK} cannot be set"):
            point_latest_to(path)
        if self.args.save_total_limit is not None:
            with only_logged(f"{self.output_dir}: old checkpoints cannot be deleted"):
                keep_newest(self.output_dir, self.args.save_total_limit)

    def _give_up(self, state: RunState) -> None:
        """Drops the save of this state on all ranks; rank 0 says why. Raises DamagedTokens: no other try cures that."""
        partial, error = self._partial(state), self.pending and self.pending.exception()
        if isinstance(error, DamagedTokens):
            raise error
        self.failures += 1
        self.retry_at = state.step + min(2**self.failures, LONGEST_WAIT)

        self.saving, self.pending, self.publishing = None, None, False
        reasons = self.ranks.gather(None if error is None else f"{type(error).__name__}: {error}")
        if not self.ranks.is_main:
            return
        shutil.rmtree(partial, ignore_errors=True)
        rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason is not None)
        problem = f"checkpoint of micro step {state.micro_step} could not be written by rank {rank} ({reason})"
        if self.lasts and state.micro_step == 0:  # nothing is lost yet
            raise ValueError(f"--output_dir {self.output_dir}: {problem}; correct this, or choose another directory")
        logger.warning("%s; %s; %s", problem, self._what_next(), self._newest)

    def _what_next(self) -> str:
        cure = "correct this" if self.lasts else "make room, if the disk is full"
        if not self.is_last:
            return f"training continues and the save is repeated at step {self.retry_at}: {cure}"
        patience = format_duration(REPAIR_WAIT_S if self.lasts else ROOM_WAIT_S)
        return f"the run has ended, and waits up to {patience} to save its last state: {cure}"

    @property
    def _newest(self) -> str:
        return "it has no checkpoint" if self.saved < 0 else f"its newest checkpoint is that of micro step {self.saved}"


class NoSaver:
    """Replaces the Saver and never saves, for benchmarks and tests that measure the steps."""

    def is_due(self, state: RunState) -> bool:
        return False

    def save(self, state: RunState) -> None:
        pass

    def wait(self) -> None:
        pass

    def status(self) -> tuple[int, int]:
        return 0, 0

    def advance(self, busy: int, failed: int) -> None:
        pass

    def finish(self, state: RunState, stop: StopRequest) -> None:
        pass


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
