"""Texts to token ids, by the tokenizer's fastest path and in batches of texts, and arrays of ids cut into blocks."""

import copy
import hashlib
import itertools
import logging
import os
from array import array
from collections.abc import Iterable, Iterator

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerBase

from text.long_texts import PIECE, LongTexts, TokenLists
from text.separators import AUTO, choose_separator

logger = logging.getLogger("train")

LONG = 4 * PIECE  # characters; longer texts are cut into pieces
SWITCHED_OFF = ("", "0", "f", "false", "n", "no", "off")  # as the tokenizers package reads its switch


class Encoder:
    """Encodes texts into one array of token ids, with a separator's id after each. Strings of special tokens are plain
    text. Raises ValueError for a tokenizer that does not have the separator.

    separator: as --document_separator names it. dtype: uint16, or uint32 for a tokenizer whose ids need it. digest:
    SHA-256 of all that decides the ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: str = AUTO):
        self.separator_id = choose_separator(separator, tokenizer).id
        largest_id = max(self.separator_id, *tokenizer.get_vocab().values())
        self.dtype = np.dtype(np.uint16 if largest_id < 2**16 else np.uint32)
        self._token_lists, backend, content = _path(tokenizer)
        self._long_texts = LongTexts(self._token_lists, backend)
        self.digest = hashlib.sha256(f"{self.separator_id} {content}".encode()).hexdigest()

    def __call__(self, texts: list[str]) -> np.ndarray:
        flat = array("I")  # array("H"), extending by a list, and numpy's own conversion all take longer
        for are_long, some in itertools.groupby(texts, lambda text: len(text) > LONG):
            for ids in map(self._long_texts.ids, some) if are_long else self._token_lists(list(some)):
                flat += array("I", ids)
                flat.append(self.separator_id)
        return np.asarray(flat).astype(self.dtype)  # (tokens,)


def ids_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids of one text as an `Encoder` has them, without a separator, which the tokenizer need not have."""
    token_lists, _, _ = _path(tokenizer)
    (ids,) = token_lists([text])
    return list(ids)


def _path(tokenizer: PreTrainedTokenizerBase) -> tuple[TokenLists, tokenizers.Tokenizer | None, str]:
    return _fast_path(tokenizer) if tokenizer.is_fast else _slow_path(tokenizer)


def _fast_path(tokenizer: PreTrainedTokenizerBase) -> tuple[TokenLists, tokenizers.Tokenizer | None, str]:
    """Returns a direct call of the Rust tokenizer, that tokenizer, and its content. Works on a copy, so that the
    caller's tokenizer keeps its settings.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True
    backend.no_truncation()  # a tokenizer.json may switch on both
    backend.no_padding()
    if (switch := os.environ.get("TOKENIZERS_PARALLELISM", "true")).lower() in SWITCHED_OFF:
        logger.warning("TOKENIZERS_PARALLELISM=%s: the tokenizer takes one core; unset it to take them all", switch)

    def token_lists(texts: list[str]) -> Iterator[list[int]]:
        return (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))

    return token_lists, backend, backend.to_str()


def _slow_path(tokenizer: PreTrainedTokenizerBase) -> tuple[TokenLists, None, str]:
    def token_lists(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return encoded["input_ids"]

    return token_lists, None, f"{tokenizer!r} {sorted(tokenizer.get_vocab().items())}"


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, flag: str, vocab_size: int) -> None:
    """Raises ValueError if the tokenizer can produce an id without a row in the embedding of the model that `flag`
    names.
    """
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= vocab_size)
    if beyond:
        named = ", ".join(f"{i} ({token!r})" for i, token in beyond[:5])
        raise ValueError(
            f"{flag} has a vocabulary of {vocab_size}, but the tokenizer {tokenizer.name_or_path!r} "
            f"has {len(beyond)} token(s) beyond it: {named}{', ...' if len(beyond) > 5 else ''}; use the "
            "tokenizer that the model was made for"
        )


def text_batches(texts: Iterable[str], max_rows: int = 1024, max_chars: int = 1 << 22) -> Iterator[list[str]]:
    """Yields batches of texts, large enough to keep all of the tokenizer's threads busy, yet bounded in memory."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if len(batch) == max_rows or chars >= max_chars:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def blocks(arrays: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Cuts a stream of id arrays into consecutive blocks of `size` ids. Yields as many blocks at a time as there are,
    (blocks, size), and drops the last partial block.
    """
    parts: list[np.ndarray] = []
    held = 0
    for ids in arrays:
        parts.append(ids)
        held += len(ids)
        if held >= size:
            joined = np.concatenate(parts)
            full = held // size * size
            yield joined[:full].reshape(-1, size)  # (blocks, size)
            parts, held = [joined[full:]], held - full
