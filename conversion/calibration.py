"""The text that mixers are fitted on, and other documents of it that the student is measured on."""

from collections.abc import Iterator
from typing import NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from text.encoding import Encoder, blocks, text_batches
from text.faults import Faults
from text.opening import open_source, open_stream, open_table
from text.separators import AUTO
from text.sources import TextSource, network_forbidden
from text.stream import TextStream

SHUFFLE_BUFFER = 10_000  # rows; files are often sorted, and a few of the first documents are no sample
TEXTS_AT_ONCE = 8  # for the tokenizer: what is left of them is not used


class Windows(NamedTuple):
    """Holds windows of text, no document of which is in both."""

    calibration: Tensor  # (n, S) int64
    held_out: Tensor  # (m, S + 1) int64


def read_windows(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    tokens: tuple[int, int],
    seq_length: int,
    seed: int,
    separator: str = AUTO,
) -> Windows:
    """Returns windows of S tokens with at least as many `tokens` for calibration, and for measuring. The documents are
    drawn from a shuffle buffer; one that is there twice counts once. Each ends with the `separator`, as
    --document_separator names it. Raises ValueError if the text has too few.
    """
    encoder = Encoder(tokenizer, separator)
    with network_forbidden(source.local_files_only):
        batches = text_batches(_without_repetitions(_texts(source, seed)), max_rows=TEXTS_AT_ONCE)
        calibration, held_out = (
            _take(source, encoder, batches, size, -(-n // seq_length), use)
            for size, n, use in (
                (seq_length, tokens[0], "--calibration_tokens"),
                (seq_length + 1, tokens[1], "--held_out_tokens, of further documents"),
            )
        )
    return Windows(calibration, held_out)


def _take(
    source: TextSource, encoder: Encoder, batches: Iterator[list[str]], size: int, n_windows: int, use: str
) -> Tensor:
    """Returns the next windows (n_windows, size), for which it takes no more batches of texts than needed."""
    stacks: list[np.ndarray] = []
    n_found = 0
    for stack in blocks(map(encoder, batches), size):
        stacks.append(stack)  # (some windows, size)
        n_found += len(stack)
        if n_found >= n_windows:
            return torch.from_numpy(np.concatenate(stacks)[:n_windows].astype(np.int64))
    raise ValueError(
        f"{source.flags.name} {source.name!r}: split {source.split!r} fills {n_found} windows of {size} tokens; "
        f"expected {n_windows} for {use}; use more text (a document that is there twice counts once), or lower that"
    )


def _texts(source: TextSource, seed: int) -> Iterator[str]:
    opened = open_source(source)
    data = open_stream(opened, source) if source.streaming else open_table(opened, source)
    stream = TextStream(
        data.to_iterable_dataset() if isinstance(data, datasets.Dataset) else data,
        source,
        shuffle_buffer=SHUFFLE_BUFFER,
        seed=seed,
        rank=0,
        world_size=1,
        explain=Faults(opened, source),
    )
    for _, texts in stream.batches(epoch=0):
        yield from texts


def _without_repetitions(texts: Iterator[str]) -> Iterator[str]:
    seen: set[int] = set()
    for text in texts:
        if (key := hash(text)) not in seen:
            seen.add(key)
            yield text
