"""Texts to token ids: the tokenizer by its fastest path, in batches of rows, and arrays of ids cut into blocks."""

import copy
import hashlib
import logging
import os
from array import array
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("train")
SWITCHED_OFF = ("", "0", "f", "false", "n", "no", "off")  # as the tokenizers package reads its switch


class Encoder:
    """Texts to one array of token ids, an end-of-text id after each. Special-token strings are plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no eos_token, expected one to stand between "
                "documents; set it in its tokenizer_config.json"
            )
        self.eos_id: int = tokenizer.eos_token_id
        largest_id = max(self.eos_id, *tokenizer.get_vocab().values())
        self.dtype = np.dtype(np.uint16 if largest_id < 2**16 else np.uint32)
        self._token_lists, content = _fast_path(tokenizer) if tokenizer.is_fast else _slow_path(tokenizer)
        self.digest = hashlib.sha256(f"{self.eos_id} {content}".encode()).hexdigest()

    def __call__(self, texts: list[str]) -> np.ndarray:
        flat = array("I")  # array("H"), extending by a list, and numpy's own conversion all take longer
        for ids in self._token_lists(texts):
            flat += array("I", ids)
            flat.append(self.eos_id)
        return np.asarray(flat).astype(self.dtype)  # (tokens,)


def _fast_path(tokenizer: PreTrainedTokenizerBase) -> tuple[Callable[[list[str]], Iterable[list[int]]], str]:
    """The Rust tokenizer called directly, and its content. A copy: the caller's keeps its own settings."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True
    backend.no_truncation()  # a tokenizer.json may ask for either
    backend.no_padding()
    if (switch := os.environ.get("TOKENIZERS_PARALLELISM", "true")).lower() in SWITCHED_OFF:
        logger.warning("TOKENIZERS_PARALLELISM=%s: the tokenizer takes one core; unset it to take them all", switch)

    def token_lists(texts: list[str]) -> Iterator[list[int]]:
        return (encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))

    return token_lists, backend.to_str()


def _slow_path(tokenizer: PreTrainedTokenizerBase) -> tuple[Callable[[list[str]], Iterable[list[int]]], str]:
    def token_lists(texts: list[str]) -> list[list[int]]:
        encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return encoded["input_ids"]

    return token_lists, f"{tokenizer!r} {sorted(tokenizer.get_vocab().items())}"


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, flag: str, vocab_size: int) -> None:
    """Every id that the tokenizer can produce has a row in the embedding of the model that `flag` names."""
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= vocab_size)
    if beyond:
        named = ", ".join(f"{i} ({token!r})" for i, token in beyond[:5])
        raise ValueError(
            f"{flag} has a vocabulary of {vocab_size}, but the tokenizer {tokenizer.name_or_path!r} "
            f"has {len(beyond)} token(s) beyond it: {named}{', ...' if len(beyond) > 5 else ''}; use the "
            "tokenizer that the model was made for"
        )


def text_batches(texts: Iterable[str], max_rows: int = 1024, max_chars: int = 1 << 22) -> Iterator[list[str]]:
    """Batches large enough to keep all of the tokenizer's threads busy, yet bounded in memory."""
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
    """Cut a stream of id arrays into consecutive blocks of `size` ids, as many at a time as there are: (blocks, size).
    The last partial block is dropped.
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
