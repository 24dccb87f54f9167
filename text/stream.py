"""One rank's share of a stream, in an order that can be gone on with exactly: `TextStream`.

The shuffle buffer is ours, because `datasets` does not save the rows in its own. A `StreamState` is a place in the
share: where to read on, and what the buffer holds. The same place is returned to when a connection breaks.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node

from text.encoding import text_batches
from text.retries import WAITS_S, is_connection_trouble
from text.rows import ROWS_AT_ONCE, RowCounts, only_texts

logger = logging.getLogger("train")


@dataclass(frozen=True)
class StreamState:
    """A place in a rank's share. Nothing in it changes while the reading goes on."""

    made_with: dict[str, object]
    position: dict | None  # of the stream, before the rows at hand; None is the start
    rows_used: int  # of those at hand
    buffer: tuple[str, ...]
    generator: dict
    counts: RowCounts

    def to_json(self) -> dict:
        return {
            "made_with": dict(self.made_with),
            "position": self.position,
            "rows_used": self.rows_used,
            "buffer": list(self.buffer),
            "generator": self.generator,
            "counts": self.counts.to_json(),
        }


class TextStream:
    """One rank's share of `stream`, shuffled in a buffer of `shuffle_buffer` texts; 0 keeps the order.

    With a buffer the files are shuffled, too, by seed and epoch and the same for every rank. `explain` makes of an
    error of reading, if it is no connection trouble, the one that is raised.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        field: str,
        *,
        shuffle_buffer: int,
        seed: int,
        rank: int,
        world_size: int,
        skip_bad_rows: bool = False,
        explain: Callable[[Exception], Exception] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.stream, self.field, self.shuffle_buffer, self.seed = stream, field, shuffle_buffer, seed
        self.rank, self.world_size, self.skip_bad_rows = rank, world_size, skip_bad_rows
        self.explain, self.sleep = explain, sleep

    def batches(self, epoch: int, state: dict | None = None) -> Iterator[tuple[StreamState, list[str]]]:
        """Batches for the tokenizer, each with the place before it. `state` is what such a place's `to_json` gave,
        there or in an earlier process.
        """
        reading = _Reading(self, epoch, None if state is None else self._fitting(epoch, state))
        before = reading.state()
        for batch in text_batches(reading.texts()):
            yield before, batch
            before = reading.state()  # the reading rests after the last text of `batch`

    def made_with(self, epoch: int) -> dict[str, object]:
        """All that decides the order, beside the data."""
        return {
            "dataset_text_field": self.field,
            "shuffle_buffer": self.shuffle_buffer,
            "seed": self.seed,
            "skip_bad_rows": self.skip_bad_rows,
            "epoch": epoch,
            "rank": self.rank,
            "world_size": self.world_size,
        }

    def share(self, epoch: int) -> datasets.IterableDataset:
        """This rank's rows, unread. Every call gives one that can be read by itself."""
        share = split_dataset_by_node(self.stream, self.rank, self.world_size)
        if self.shuffle_buffer > 0:
            # all that `set_epoch` does with a stream that was not shuffled is to shuffle its files, unless it is 0
            share.set_epoch(int(np.random.default_rng([self.seed, epoch]).integers(1, 2**31)))
        return share

    def _fitting(self, epoch: int, state: dict) -> dict:
        """A saved state, if it is of the order that this stream has."""
        was, now = state["made_with"], self.made_with(epoch)
        if now == {**was, "skip_bad_rows": True}:
            # A run that a bad row ended goes on without it. Another reader reads the same rows up to there, but its
            # position is written in another way: so the rows are counted.
            state = {**state, "position": None, "rows_used": state["counts"]["seen"]} if was != now else state
            was = now
        if changed := [name for name in now if now[name] != was[name]]:
            values = ", ".join(f"{name} {was[name]!r} (now {now[name]!r})" for name in changed)
            raise ValueError(
                f"the saved place in the data was made with {values}: expected the same, because the order depends on "
                "it; give the same value again, or start without the saved place"
            )
        return state


class _Reading:
    """One pass over a share: all that changes while it is read."""

    def __init__(self, source: TextStream, epoch: int, state: dict | None):
        self.source, self.epoch = source, epoch
        self.generator = np.random.default_rng([source.seed, epoch, source.rank])
        self.position: dict | None = None
        self.rows_used = 0
        self.buffer: list[str] = []
        self.counts = RowCounts()
        if state is not None:
            self.generator.bit_generator.state = state["generator"]
            self.position, self.rows_used = state["position"], state["rows_used"]
            self.buffer = list(state["buffer"])
            self.counts = RowCounts.from_json(state["counts"])

    def state(self) -> StreamState:
        return StreamState(
            made_with=self.source.made_with(self.epoch),
            position=self.position,  # replaced, never changed
            rows_used=self.rows_used,
            buffer=tuple(self.buffer),
            generator=dict(self.generator.bit_generator.state),  # made anew by every call
            counts=self.counts.copy(),
        )

    def texts(self) -> Iterator[str]:
        rows = only_texts(self._rows(), self.source.field, self.source.skip_bad_rows, self.counts)
        for text in rows:
            self.buffer.append(text)
            if len(self.buffer) > self.source.shuffle_buffer:
                yield self._draw()
        while self.buffer:
            yield self._draw()

    def _draw(self) -> str:
        i = int(self.generator.integers(len(self.buffer)))
        self.buffer[i], self.buffer[-1] = self.buffer[-1], self.buffer[i]
        return self.buffer.pop()

    def _rows(self) -> Iterator[object]:
        behind = self.rows_used  # which may be all that come at once, and more
        for position, rows in self._rows_at_once(self.position):
            self.position, self.rows_used = position, min(behind, len(rows))
            behind -= self.rows_used
            for row in rows[self.rows_used :]:
                self.rows_used += 1
                yield row

    def _rows_at_once(self, position: dict | None) -> Iterator[tuple[dict | None, list]]:
        """Some hundred rows at a time, from `position` on, each with the position before them."""
        share, batches = self._open(position)
        lost = 0
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # raised again, unless another try makes it good
                if is_connection_trouble(error):
                    self._wait(error, lost)
                    lost += 1
                    share, batches = self._open(position)
                    continue
                if self.source.explain is None:
                    raise
                raise self.source.explain(error) from error
            if batch is None:
                return
            lost = 0
            yield position, batch[self.source.field]
            position = share.state_dict()

    def _open(self, position: dict | None) -> tuple[datasets.IterableDataset, Iterator[dict]]:
        share = self.source.share(self.epoch)
        if position is not None:
            share.load_state_dict(position)
        return share, share.iter(batch_size=ROWS_AT_ONCE)

    def _wait(self, error: Exception, lost: int) -> None:
        what = f"{type(error).__name__}: {error}"
        if lost == len(WAITS_S):
            raise ConnectionError(
                f"the data cannot be read: {lost} tries one after the other brought no further row ({what}); see to "
                "the connection and resume from the last checkpoint, or use data on a disk"
            ) from error
        seconds = WAITS_S[lost]
        logger.warning("reading the data failed (%s): try %d of %d in %d s", what, lost + 1, len(WAITS_S), seconds)
        self.source.sleep(seconds)
