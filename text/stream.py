"""One rank's share of a stream, in an order that can be resumed exactly: `TextStream`.

The shuffle buffer is ours, because `datasets` does not save the rows in its own. A `StreamState` is a place in the
share: where to read on, and what the buffer holds. Reading also returns to its place when a connection breaks.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node

from text.encoding import text_batches
from text.faults import Faults
from text.retries import WAITS_S, is_connection_trouble
from text.rows import ROWS_AT_ONCE, RowCounts, only_texts
from text.sources import TextSource

logger = logging.getLogger("train")


@dataclass(frozen=True)
class StreamState:
    """Holds a place in a rank's share. Further reading changes nothing in it."""

    made_with: dict[str, object]
    position: dict | None  # of the stream, before the rows that were read last; None is the start
    rows_used: int  # of the rows that were read last
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
    """Reads one rank's share of `stream`, shuffled in a buffer of `shuffle_buffer` texts; 0 keeps the order.

    With a buffer the files are shuffled, too, by seed and epoch and the same for every rank. `explain` turns an error
    of reading, if it is no connection trouble, into the one that is raised.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        source: TextSource,
        *,
        shuffle_buffer: int,
        seed: int,
        rank: int,
        world_size: int,
        explain: Faults | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.stream, self.source, self.shuffle_buffer, self.seed = stream, source, shuffle_buffer, seed
        self.rank, self.world_size, self.explain, self.sleep = rank, world_size, explain, sleep

    def batches(self, epoch: int, state: dict | None = None) -> Iterator[tuple[StreamState, list[str]]]:
        """Yields batches for the tokenizer, each with the place before it. `state` is such a place as JSON, of this or
        an earlier process. Raises ValueError if it belongs to another order.
        """
        reading = _Reading(self, epoch, None if state is None else self._checked(epoch, state))
        before = reading.state()
        for batch in text_batches(reading.texts()):
            yield before, batch
            before = reading.state()  # which stands after the last text of `batch`

    def made_with(self, epoch: int) -> dict[str, object]:
        """Returns all that decides the order, beside the data."""
        return {
            "dataset_text_field": self.source.text_field,
            "shuffle_buffer": self.shuffle_buffer,
            "seed": self.seed,
            "skip_bad_rows": self.source.skip_bad_rows,
            "epoch": epoch,
            "rank": self.rank,
            "world_size": self.world_size,
        }

    def rows(self, epoch: int) -> datasets.IterableDataset:
        """Returns this rank's rows, unread. What each call returns is read independently of the others."""
        rows = split_dataset_by_node(self.stream, self.rank, self.world_size)
        if self.shuffle_buffer > 0:
            # With a stream that was not shuffled, `set_epoch` only shuffles the files, and does not for 0.
            rows.set_epoch(int(np.random.default_rng([self.seed, epoch]).integers(1, 2**31)))
        return rows

    def _checked(self, epoch: int, state: dict) -> dict:
        """Returns a saved state if it belongs to this stream's order. Raises ValueError if not."""
        was, now = state["made_with"], self.made_with(epoch)
        if now == {**was, "skip_bad_rows": True}:
            # A run that stopped at a bad row may be resumed with --skip_bad_rows. The tolerant reader reads the same
            # rows up to there, but writes its position in another way: the rows that were seen are counted instead.
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
    """Makes one pass over a share, and holds all that changes during it."""

    def __init__(self, share: TextStream, epoch: int, state: dict | None):
        self.share, self.epoch = share, epoch
        self.generator = np.random.default_rng([share.seed, epoch, share.rank])
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
            made_with=self.share.made_with(self.epoch),
            position=self.position,  # replaced, never changed
            rows_used=self.rows_used,
            buffer=tuple(self.buffer),
            generator=dict(self.generator.bit_generator.state),  # a new one at every call
            counts=self.counts.copy(),
        )

    def texts(self) -> Iterator[str]:
        for text in only_texts(self._rows(), self.share.source, self.counts):
            self.buffer.append(text)
            if len(self.buffer) > self.share.shuffle_buffer:
                yield self._draw()
        while self.buffer:
            yield self._draw()

    def _draw(self) -> str:
        i = int(self.generator.integers(len(self.buffer)))
        self.buffer[i], self.buffer[-1] = self.buffer[-1], self.buffer[i]
        return self.buffer.pop()

    def _rows(self) -> Iterator[object]:
        behind = self.rows_used  # rows to pass over; there may be more than are read at once
        for position, rows in self._rows_at_once(self.position):
            self.position, self.rows_used = position, min(behind, len(rows))
            behind -= self.rows_used
            for row in rows[self.rows_used :]:
                self.rows_used += 1
                yield row

    def _rows_at_once(self, position: dict | None) -> Iterator[tuple[dict | None, list]]:
        """Yields some hundred rows at a time, from `position` on, with the position before them."""
        rows, batches = self._open(position)
        lost = 0
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # raised again, unless another try may succeed
                if is_connection_trouble(error):
                    self._wait(error, lost)
                    lost += 1
                    rows, batches = self._open(position)
                    continue
                if self.share.explain is None:
                    raise
                raise self.share.explain(error) from error
            if self.share.explain is not None:
                self.share.explain.look(is_end=batch is None)
            if batch is None:
                return
            lost = 0
            yield position, batch[self.share.source.text_field]
            position = rows.state_dict()

    def _open(self, position: dict | None) -> tuple[datasets.IterableDataset, Iterator[dict]]:
        rows = self.share.rows(self.epoch)
        if position is not None:
            rows.load_state_dict(position)
        return rows, rows.iter(batch_size=ROWS_AT_ONCE)

    def _wait(self, error: Exception, lost: int) -> None:
        what = f"{type(error).__name__}: {error}"
        if lost == len(WAITS_S):
            raise ConnectionError(
                f"the data cannot be read: {lost} tries one after the other brought no further row ({what}); check "
                "the connection and resume from the last checkpoint, or use data on a disk"
            ) from error
        seconds = WAITS_S[lost]
        logger.warning("reading the data failed (%s): try %d of %d in %d s", what, lost + 1, len(WAITS_S), seconds)
        self.share.sleep(seconds)
