"""Documents to one flat file of token ids, and windows of `seq_len + 1` ids as a view of that file.

Every document is followed by one end-of-text id and nothing else is added. The file does not depend on the
window length. It is written beside its final place and renamed when whole: what is found there is finished.
"""

import contextlib
import copy
import hashlib
import json
import logging
import os
import queue
import shutil
import threading
import time
import uuid
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from utils import flush_to_disk

logger = logging.getLogger("train")

T = TypeVar("T")

FORMAT_VERSION = 1  # raise it when the same text would give another token file
SWITCHED_OFF = ("", "0", "f", "false", "n", "no", "off")  # as the tokenizers package reads its switch
ABANDONED_AFTER_S = 24 * 3600.0  # a build that wrote nothing for so long was killed


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


def run_ahead(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Draw `items` in a thread, up to `depth` ahead. Its errors are raised here; closing this ends it."""
    ready: queue.Queue[T | Exception | None] = queue.Queue(depth)
    stop = threading.Event()

    def offer(item: T | Exception | None) -> bool:
        # the main thread may also end without closing us, and then nobody will ever take what we offer
        while not stop.is_set() and threading.main_thread().is_alive():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not offer(item):
                    return
        except Exception as error:  # handed over, not hidden
            offer(error)
        else:
            offer(None)

    thread = threading.Thread(target=produce, name="run-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(timeout=10)  # it may be waiting for a lost connection, which must not keep the process


def write_token_file(directory: Path, texts: Iterable[str], encoder: Encoder, made_from: dict) -> None:
    """Tokenise `texts` into `directory`, which appears whole or not at all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(directory)
    partial = directory.with_name(f"{directory.name}.partial-{uuid.uuid4().hex}")
    partial.mkdir()
    started = time.monotonic()
    tokens = documents = 0
    digest = hashlib.sha256()
    try:
        with open(partial / "tokens.bin", "wb") as file:
            for n_texts, ids in _encoded_ahead(encoder, text_batches(texts)):
                ids.tofile(file)
                digest.update(ids.data)
                tokens += len(ids)
                documents += n_texts
        about = {"tokens": tokens, "documents": documents, "dtype": encoder.dtype.name}
        about |= {"sha256": digest.hexdigest(), **made_from}
        (partial / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        for path in (partial / "tokens.bin", partial / "about.json", partial):
            flush_to_disk(path)
        _publish(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    seconds = time.monotonic() - started
    logger.info("packed %d tokens of %d documents in %.1f s: %s", tokens, documents, seconds, directory)


def _encoded_ahead(encoder: Encoder, batches: Iterable[list[str]]) -> Iterator[tuple[int, np.ndarray]]:
    """Encode in order with two batches under way.

    The tokenizer releases the interpreter lock and uses all cores for one batch; turning its result into an
    array does not. Two threads let one batch be converted while the next is tokenised.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        pending: deque[tuple[int, Future[np.ndarray]]] = deque()
        for batch in batches:
            pending.append((len(batch), pool.submit(encoder, batch)))
            if len(pending) > 2:
                n_texts, ids = pending.popleft()
                yield n_texts, ids.result()
        for n_texts, ids in pending:
            yield n_texts, ids.result()


def _publish(partial: Path, directory: Path) -> None:
    try:
        os.replace(partial, directory)
    except OSError:
        if not directory.exists():
            raise
        # Another job built the same tokens meanwhile; its ranks may have them open, so ours go.
    else:
        flush_to_disk(directory.parent)


def _remove_abandoned(directory: Path) -> None:
    """What killed builds left behind. A live one writes to its file all the time."""
    for partial in directory.parent.glob("*.partial-*"):
        with contextlib.suppress(FileNotFoundError):  # its builder may finish meanwhile
            written = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
            if time.time() - written > ABANDONED_AFTER_S:
                shutil.rmtree(partial, ignore_errors=True)


def wait_for_token_file(directory: Path, poll_s: float = 1.0) -> None:
    """Wait until another process has finished `directory`; by polling, for a collective would time out."""
    started = logged = time.monotonic()
    while not directory.exists():
        if time.monotonic() - logged >= 60:
            logged = time.monotonic()
            minutes = (logged - started) / 60
            logger.info("waiting for the packed dataset for %.0f min: %s", minutes, directory)
        time.sleep(poll_s)


class PackedTextDataset(torch.utils.data.Dataset[Tensor]):
    """Window i of a token file: ids [i * (seq_len + 1), (i + 1) * (seq_len + 1)), memory-mapped."""

    def __init__(self, directory: Path, seq_len: int):
        self.directory = directory
        self.seq_len = seq_len
        about = json.loads((directory / "about.json").read_text(encoding="utf-8"))
        self.n_tokens: int = about["tokens"]
        self.sha256: str | None = about.get("sha256")  # of all tokens; token files of before do not tell
        dtype = np.dtype(about["dtype"])
        path = directory / "tokens.bin"
        if path.stat().st_size != self.n_tokens * dtype.itemsize:
            raise ValueError(f"{path} does not hold {self.n_tokens} {dtype} tokens: delete {directory}")
        # numpy cannot map an empty file
        self._tokens = np.memmap(path, dtype, mode="r") if self.n_tokens else np.empty(0, dtype)

    def __len__(self) -> int:
        return self.n_tokens // (self.seq_len + 1)

    def __getitem__(self, i: int) -> Tensor:
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        start = i * (self.seq_len + 1)
        return torch.from_numpy(self._tokens[start : start + self.seq_len + 1].astype(np.int64))  # (S + 1,)

    def __reduce__(self) -> tuple[type["PackedTextDataset"], tuple[Path, int]]:
        # for loader workers that are not forked: a pickled memory map would carry the whole file
        return PackedTextDataset, (self.directory, self.seq_len)
