"""text/encoding.py: token ids are exactly what the documents say, and batches and blocks are cut as asked."""

import pickle
import random

import numpy as np
import pytest
import tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from tests.text.documents import EOS, plain_ids, random_documents, small_tokenizer
from text.encoding import Encoder, blocks, check_tokenizer, text_batches


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


def test_tokenizer_errors():
    without_eos = PreTrainedTokenizerFast(tokenizer_object=small_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="has no eos_token.*set it"):
        Encoder(without_eos)
    n = len(small_tokenizer())
    check_tokenizer(small_tokenizer(), "--student_model", n)
    with pytest.raises(ValueError, match=rf"--student_model .* {n - 2}, .* 2 token.*{n - 2} \(.*{n - 1} \("):
        check_tokenizer(small_tokenizer(), "--student_model", n - 2)


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
