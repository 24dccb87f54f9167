"""packing.py: ids, windows and files are exactly what the documents say, whatever happens to the builder."""

import contextlib
import functools
import logging
import os
import pickle
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from data import PackedTextDataset
from tests import fresh
from text import token_file
from text.encoding import Encoder, blocks, check_tokenizer, text_batches
from text.rows import RowCounts, only_texts
from text.sources import TextSource
from text.token_file import write_token_file
from utils import run_ahead

EOS = "<|endoftext|>"
WORDS = ["the", "cat", " sat", "\n", "naïve", "日本", "  ", "42", EOS, "🙂", "x" * 40, "\t", "don't", "."]


@functools.cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["the cat sat on the mat, the cat that sat"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS)


def random_documents(seed: int, n: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(WORDS, k=rng.choice([1, 2, 7, 33, 150]))) for _ in range(n)]


def plain_ids(documents: list[str]) -> list[int]:
    """The definition: each document by the byte-level model alone, blind to special tokens, then EOS."""
    tokenizer = small_tokenizer()
    plain = tokenizers.Tokenizer(tokenizer.backend_tokenizer.model)
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ids = []
    for document in documents:
        ids += [*plain.encode(document).ids, tokenizer.eos_token_id]
    return ids


def write(directory: Path, documents: list[str]) -> None:
    write_token_file(directory, documents, Encoder(small_tokenizer()), {"made": "here"})


def stored_ids(directory: Path) -> list[int]:
    return [int(window[0]) for window in PackedTextDataset(directory, seq_len=0)]


# ---- tokens


def test_special_token_strings_are_plain_text_and_the_callers_tokenizer_keeps_its_settings():
    tokenizer = small_tokenizer()
    document = f"a{EOS}b"
    ids = Encoder(tokenizer)([document, "c"]).tolist()
    assert ids == plain_ids([document, "c"])
    assert ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.encode(document, add_special_tokens=False).count(tokenizer.eos_token_id) == 1


def test_truncation_padding_and_added_tokens_of_a_tokenizer_do_not_touch_the_data():
    tokenizer = pickle.loads(pickle.dumps(small_tokenizer()))
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    backend.post_processor = tokenizers.processors.TemplateProcessing(f"{EOS} $A", special_tokens=[(EOS, 0)])
    documents = random_documents(0, 5)
    assert Encoder(tokenizer)(documents).tolist() == plain_ids(documents)
    assert backend.truncation is not None and backend.padding is not None


def test_tokenizer_without_a_rust_backend():
    tokenizer = ByT5Tokenizer()
    ids = Encoder(tokenizer)(["a</s>b", "c"])
    assert ids.tolist() == [byte + 3 for byte in b"a</s>b"] + [1] + [ord("c") + 3, 1]
    assert len(Encoder(tokenizer).digest) == 64


def test_digest_follows_the_tokenizers_content():
    other = pickle.loads(pickle.dumps(small_tokenizer()))
    assert Encoder(other).digest == Encoder(small_tokenizer()).digest
    other.add_tokens(["more"])
    assert Encoder(other).digest != Encoder(small_tokenizer()).digest


def test_ids_are_stored_in_two_bytes_while_they_fit():
    assert Encoder(small_tokenizer()).dtype == np.uint16
    large = pickle.loads(pickle.dumps(small_tokenizer()))
    large.add_tokens([f"<{i}>" for i in range(2**16)])
    encoder = Encoder(large)
    assert encoder.dtype == np.uint32
    assert encoder([f"<{2**16 - 1}>"]).tolist() == [len(large) - 1, 0]


def test_a_tokenizer_held_to_one_core_is_mentioned(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    for value in ("true", "False"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", value)
        Encoder(small_tokenizer())
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["TOKENIZERS_PARALLELISM=False"]


def run_times() -> dict[str, int]:
    """Of all threads of this process, in ns."""
    times = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # one may have ended meanwhile
            times[task.name] = int((task / "schedstat").read_text().split()[0])
    return times


def busy_threads(folder: Path) -> int:
    """Threads not of Python that have had a part in the packing of a file."""
    documents = random_documents(0, 20_000)
    write(folder / "first", documents[:100])
    list(DataLoader(range(4), num_workers=1))  # its worker is forked, behind the tokenizer's back
    before = run_times()
    write(folder / "second", documents)
    ours = {str(thread.native_id) for thread in threading.enumerate()}
    spent = [time - before.get(task, 0) for task, time in run_times().items() if task not in ours]
    return sum(time > 0.05 * sum(spent) for time in spent)


def test_packing_keeps_the_tokenizers_threads_beside_forked_workers(tmp_path: Path):
    """In a forked process the tokenizer has one thread, and says nothing of it. Packing has to stay out of those."""
    # of three, should a busy machine let one of them sleep
    assert fresh.call(busy_threads, tmp_path, RAYON_NUM_THREADS="3") >= 2


def test_tokenizer_errors():
    without_eos = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="has no eos_token.*set it"):
        Encoder(without_eos)
    n = len(small_tokenizer())
    check_tokenizer(small_tokenizer(), "--student_model", n)
    with pytest.raises(ValueError, match=rf"--student_model .* {n - 2}, .* 2 token.*{n - 2} \(.*{n - 1} \("):
        check_tokenizer(small_tokenizer(), "--student_model", n - 2)


# ---- rows, batches, blocks


def test_rows_without_text_are_skipped_and_counted_once(caplog):
    with caplog.at_level(logging.WARNING, "train"):
        assert list(only_texts(["a", None, "", "b", None], TextSource("rows"))) == ["a", "b"]
    assert [record.getMessage() for record in caplog.records] == ["skipped 3 of 5 rows: no text in column 'text'"]


def test_row_that_is_not_text_is_named():
    with pytest.raises(ValueError, match="--dataset_text_field 'body': row 2 as read here holds int .5."):
        list(only_texts(["a", None, 5], TextSource("rows", text_field="body")))


def test_counts_go_on_from_where_they_were_stored(caplog):
    counts = RowCounts()
    with pytest.raises(ValueError):
        list(only_texts(["a", None, "", 5], TextSource("rows"), counts))
    stored = counts.to_json()
    again = RowCounts.from_json(stored)
    assert list(only_texts([6, None, "b"], TextSource("rows", skip_bad_rows=True), again)) == ["b"]
    assert [record.getMessage() for record in caplog.records] == [
        "skipped 3 of 7 rows: no text in column 'text'",
        "--skip_bad_rows: skipped 1 of 7 rows: row 4 as read here: int (6)",
    ]
    assert stored == RowCounts(seen=4, empty=2).to_json()


def test_text_batches_bound_rows_and_characters():
    texts = ["a" * n for n in (1, 5, 3, 12, 1, 1, 1, 1)]
    batches = list(text_batches(texts, max_rows=3, max_chars=10))
    assert batches == [texts[:3], texts[3:4], texts[4:7], texts[7:]]


@pytest.mark.parametrize("seed", range(5))
def test_blocks_are_consecutive_and_full(seed: int):
    rng = random.Random(seed)
    arrays = [np.arange(rng.choice([0, 1, 3, 50])) for _ in range(20)]
    size = rng.choice([1, 2, 7, 31, 1000])
    ids = np.concatenate(arrays)
    cut = [block for stack in blocks(arrays, size) for block in stack]
    assert len(cut) == len(ids) // size
    assert [i for block in cut for i in block] == ids[: len(cut) * size].tolist()


# ---- the token file


@pytest.mark.parametrize("seed", range(4))
def test_windows_joined_are_the_documents_joined(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch):
    small_batches = functools.partial(text_batches, max_rows=7)
    monkeypatch.setattr(token_file, "text_batches", small_batches)  # many batches: their order counts
    documents = random_documents(seed, n=60)
    write(tmp_path / "packed", documents)
    expected = plain_ids(documents)
    for seq_len in (1, 8, 61):
        windows = PackedTextDataset(tmp_path / "packed", seq_len)
        assert len(windows) == len(expected) // (seq_len + 1)
        assert all(window.shape == (seq_len + 1,) and window.dtype == torch.int64 for window in windows)
        assert torch.cat(list(windows)).tolist() == expected[: len(windows) * (seq_len + 1)]


def test_token_file_says_what_it_is_made_from(tmp_path: Path):
    write(tmp_path / "packed", ["a", "b"])
    about = (tmp_path / "packed" / "about.json").read_text()
    assert '"documents": 2' in about and '"tokens": 4' in about and '"made": "here"' in about


def test_failed_build_leaves_nothing(tmp_path: Path):
    def documents():
        yield from ["a"] * 5000
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        write(tmp_path / "packed", documents())
    assert list(tmp_path.iterdir()) == []


def test_two_builders_at_once_leave_one_whole_file(tmp_path: Path):
    documents = random_documents(1, 20)
    both_halfway = threading.Barrier(2)

    def build() -> None:
        def texts():
            yield from documents[:10]
            both_halfway.wait(timeout=30)
            yield from documents[10:]

        write(tmp_path / "packed", texts())

    builders = [threading.Thread(target=build) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert stored_ids(tmp_path / "packed") == plain_ids(documents)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_what_killed_builders_left_is_removed_but_not_the_work_of_a_live_one(tmp_path: Path):
    for name in ("dead", "live"):
        (tmp_path / f"packed.partial-{name}").mkdir()
        (tmp_path / f"packed.partial-{name}" / "tokens.bin").write_bytes(b"12")
    long_ago = time.time() - token_file.ABANDONED_AFTER_S - 60
    for path in (tmp_path / "packed.partial-dead", tmp_path / "packed.partial-dead" / "tokens.bin"):
        os.utime(path, (long_ago, long_ago))
    os.utime(tmp_path / "packed.partial-live", (long_ago, long_ago))  # only its file is being written
    write(tmp_path / "packed", ["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "packed.partial-live"]


def test_damaged_token_file_is_refused(tmp_path: Path):
    write(tmp_path / "packed", ["abc"])
    os.truncate(tmp_path / "packed" / "tokens.bin", 2)
    with pytest.raises(ValueError, match="does not hold 4 uint16 tokens: delete"):
        PackedTextDataset(tmp_path / "packed", 1)


def test_windows_travel_to_a_worker_without_the_file(tmp_path: Path):
    documents = random_documents(2, 300)
    write(tmp_path / "packed", documents)
    windows = PackedTextDataset(tmp_path / "packed", 8)
    pickled = pickle.dumps(windows)
    assert len(pickled) < 1000 < len(plain_ids(documents))
    assert torch.equal(pickle.loads(pickled)[3], windows[3])
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_no_documents_give_no_windows(tmp_path: Path):
    write(tmp_path / "packed", [])
    assert len(PackedTextDataset(tmp_path / "packed", 8)) == 0


# ---- the thread


def ahead_threads() -> int:
    return sum(thread.name == "run-ahead" for thread in threading.enumerate())


def test_run_ahead_draws_before_it_is_asked_but_not_without_bound():
    drawn = []
    ahead = run_ahead((drawn.append(i) or i for i in range(100)), depth=4)
    assert next(ahead) == 0
    deadline = time.monotonic() + 10
    while len(drawn) < 6 and time.monotonic() < deadline:  # one taken, four waiting, one in hand
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(drawn) == 6
    assert list(ahead) == list(range(1, 100))
    assert ahead_threads() == 0


def test_run_ahead_raises_the_threads_error_after_what_came_before():
    def items():
        yield 1
        raise ValueError("row 7")

    ahead = run_ahead(items(), depth=4)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="row 7"):
        next(ahead)
    assert ahead_threads() == 0


def test_run_ahead_ends_its_thread_when_the_consumer_breaks_off():
    for i in run_ahead(iter(range(10**9)), depth=2):
        if i == 3:
            break
    assert ahead_threads() == 0
