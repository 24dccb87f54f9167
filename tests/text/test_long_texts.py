"""text/long_texts.py: a text in pieces has the ids of the whole, whatever tokenizer and text are; no piece is long."""

import base64
import dataclasses
import functools
import logging
import random
from collections.abc import Callable, Sequence

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from tests.text.documents import EOS, random_documents, small_tokenizer
from text import encoding, long_texts
from text.encoding import Encoder

PIECE = 900
LENGTH = 3600  # of a text, about
WORDS = (  # Llama 3's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LINES = [
    "The cat's sat on the mat; it wasn't 1234567 naïve.\n",
    "日本の猫、魚を食べる。",
    "if x:\n        y = x + 1\n\n\n",
]
RUNS = "aaaaaaaa        \n\n\n\n\n\n======= 777777777 ééééé ab ab ab ab \t\t\t\t"


def trained(
    model, trainer, pre_tokenizer=None, normalizer=None, added: Sequence[AddedToken] = ()
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.train_from_iterator([*LINES, RUNS, *LINES], trainer(special_tokens=[EOS, "<unk>"], show_progress=False))
    backend.add_tokens(list(added))
    return backend


def byte_pairs(pre_tokenizer=None, *, trainer: dict | None = None, model: dict | None = None, **more):
    trainer = {"vocab_size": 600, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()} | (trainer or {})
    return trained(
        models.BPE(**(model or {})), functools.partial(trainers.BpeTrainer, **trainer), pre_tokenizer, **more
    )


def byte_level(pattern: str, **more) -> tokenizers.Tokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return byte_pairs(pre_tokenizers.Sequence(steps), **more)


def without_words() -> tokenizers.Tokenizer:
    """Returns a tokenizer like Llama 2's, which merges across blanks, too: its only word is the whole text."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = {"vocab_size": 330, "max_token_length": 8}
    return byte_pairs(normalizer=normalizer, trainer=trainer, model={"unk_token": "<unk>", "fuse_unk": True})


def bytes_without_words() -> tokenizers.Tokenizer:
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_pairs(pre_tokenizer, trainer={"vocab_size": 330, "max_token_length": 8})


def unigram(pre_tokenizer, normalizer=None) -> tokenizers.Tokenizer:
    trainer = functools.partial(trainers.UnigramTrainer, vocab_size=150, unk_token="<unk>")
    return trained(models.Unigram(), trainer, pre_tokenizer, normalizer)


def wordpiece() -> tokenizers.Tokenizer:
    trainer = functools.partial(trainers.WordPieceTrainer, vocab_size=200)
    model = models.WordPiece(unk_token="<unk>")
    return trained(model, trainer, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer())


def line_end_and_blank() -> tokenizers.Tokenizer:
    """Returns a tokenizer with one merge, which is made only if a line ends behind all of the blanks that follow."""
    backend = byte_level(WORDS)
    vocab = {token: i for i, token in enumerate([EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĠ"])}
    backend.model = models.BPE(vocab=vocab, merges=[("Ċ", "Ġ")])
    return backend


ADDED = [AddedToken("cat", single_word=True), AddedToken("mat;", rstrip=True), AddedToken("aaa", lstrip=True)]
TOKENIZERS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "Llama 3": lambda: byte_level(WORDS, model={"ignore_merges": True}),
    "GPT-2, a blank before the text": lambda: byte_pairs(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "digits": lambda: byte_level(r"\p{N}{3}|\s+|[^\s\p{N}]+"),
    "NFC": lambda: byte_level(WORDS, normalizer=normalizers.NFC()),
    "added tokens": lambda: byte_level(WORDS, added=ADDED),
    "a line's end and a blank": line_end_and_blank,
    "Llama 2": without_words,
    "bytes without words": bytes_without_words,
    "Metaspace": lambda: byte_pairs(pre_tokenizers.Metaspace(prepend_scheme="always"), model={"unk_token": "<unk>"}),
    "Unigram": lambda: unigram(pre_tokenizers.Metaspace(prepend_scheme="first"), normalizers.NFKC()),
    "WordPiece": wordpiece,
    "words of seven characters": lambda: byte_pairs(pre_tokenizers.FixedLength(7), model={"unk_token": "<unk>"}),
}


@functools.cache
def encoder(name: str) -> Encoder:
    return Encoder(PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[name](), eos_token=EOS))


def mixed(parts: list[str], lengths: list[int], seed: int) -> str:
    rng, text = random.Random(seed), ""
    while len(text) < LENGTH:
        text += rng.choice(parts) * rng.choice(lengths)
    return text


SIGNS = [
    "a",
    "b",
    " ",
    "\n",
    "'s",
    "'",
    "_",
    "1",
    "23",
    "日",
    "本。",
    "é",
    "🙂",
    "  ",
    " \n",
    "\u0301",
    "ll",
    EOS,
    "\r\n",
]
TEXTS: dict[str, Callable[[int], str]] = {
    "prose": lambda seed: mixed(LINES, [1], seed),
    "documents": lambda seed: "".join(random_documents(seed, 300))[:LENGTH],
    "signs": lambda seed: mixed(SIGNS, [1], seed),
    "runs": lambda seed: mixed(SIGNS, [1, 2, 3, 300, 1000, 2500], seed),
    "blanks": lambda seed: mixed(["x", "\n", " ", "\t", ".\n"], [1, 1, 1, 300, 2500], seed),
    "one letter": lambda seed: "a" * (LENGTH - seed),
    "letters": lambda seed: mixed(["ab", "a", "c"], [1, 2, 3], seed),
    "newlines": lambda seed: "\n" * (LENGTH - seed),
    "spaces": lambda seed: " " * (LENGTH - seed) + ["x", "", "\n", "\n  y"][seed % 4],
    "a word and spaces": lambda seed: "word" + " " * LENGTH + ["x", "", "\n", "\n  y"][seed % 4],
    "an empty line that is long": lambda seed: "word\n" + " " * LENGTH + ["\n", "\nx", "x", ""][seed % 4],
    "digits": lambda seed: mixed(["1", "23", "777"], [1], seed),
    "numbers": lambda seed: mixed(["0.123, ", "77;", "5\n"], [1], seed),
    "base64": lambda seed: base64.b64encode(random.Random(seed).randbytes(LENGTH)).decode(),
    "emoji": lambda seed: mixed(["🙂", "👍🏽", "❤️", "="], [1, 2], seed),
    "a mark that moves in front of many": lambda seed: "e" + "\u0301" * (LENGTH - seed) + "\u0323",
    "marks": lambda seed: mixed(["e", "a\u0301", "\u0301\u0323\u0308", "न", "\u093f"], [1, 1, 1, 1000], seed),
}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(long_texts, "PIECE", PIECE)
    monkeypatch.setattr(long_texts, "AT_ONCE", 3)
    monkeypatch.setattr(encoding, "LONG", PIECE)


def in_pieces(encoder: Encoder, text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], int]:
    """Returns the text's ids, and the length of the longest piece."""
    lengths: list[int] = []
    token_lists = encoder._token_lists

    def recorded(texts: list[str]):
        lengths.extend(map(len, texts))
        return token_lists(texts)

    monkeypatch.setattr(encoder._long_texts, "_token_lists", recorded)
    return encoder([text]).tolist(), max(lengths)


def whole(encoder: Encoder, text: str) -> list[int]:
    return [*next(iter(encoder._token_lists([text]))), encoder.separator_id]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_have_the_ids_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch):
    for kind, make in TEXTS.items():
        for seed in range(2):
            text = make(seed)
            ids, _ = in_pieces(encoder(name), text, monkeypatch)
            assert ids == whole(encoder(name), text), (kind, seed)


# A tokenizer that adds a blank has no cut inside a word, and words that depend on counting have none at all.
LONG_WORDS = ["one letter", "letters", "newlines", "spaces", "a word and spaces", "emoji", "digits"]
IN_PIECES = [(name, "prose") for name in TOKENIZERS if name != "words of seven characters"]
IN_PIECES += [("Llama 3", kind) for kind in (*LONG_WORDS, "numbers", "base64", "documents", "signs")]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(("name", "kind"), IN_PIECES)
def test_no_piece_is_longer_than_a_piece(name: str, kind: str, monkeypatch: pytest.MonkeyPatch):
    _, longest = in_pieces(encoder(name), TEXTS[kind](0), monkeypatch)
    assert longest <= PIECE + 1  # it begins with the character before its cut


@pytest.mark.usefixtures("small_pieces")
def test_tokens_reach_over_blanks_where_there_are_no_words():
    for name in ("Llama 2", "bytes without words"):
        tokens = encoder(name)._long_texts._backend.encode(TEXTS["prose"](0)).tokens
        assert any(token[1:-1].strip("▁Ġ") != token[1:-1] for token in tokens), "nothing is tried"


@pytest.mark.usefixtures("small_pieces")
def test_a_tokenizer_in_python_takes_the_whole_text_and_says_so(monkeypatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(long_texts, "LARGE_PIECE", 4 * PIECE)
    text = TEXTS["documents"](0)
    assert Encoder(ByT5Tokenizer())([text, "b"]).tolist() == [byte + 3 for byte in text.encode()] + [1, ord("b") + 3, 1]
    assert f"{len(text)} characters of a document are tokenised at once" in caplog.text


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("changes", [{"before": 10**6}, {"after": 10**6}, {"head": (10**6,)}])
@pytest.mark.parametrize("n_wrong", [1, 2, 99])
def test_pieces_are_joined_at_a_cut_with_other_ids_than_it_was_verified_with(
    changes: dict, n_wrong: int, monkeypatch: pytest.MonkeyPatch
):
    find, wrong_cuts = long_texts.LongTexts._cut_behind_word, []

    def wrong(self, text: str, at: int):
        cut = find(self, text, at)
        if cut is None or at < PIECE or len(wrong_cuts) == n_wrong:
            return cut
        wrong_cuts.append(at)
        return dataclasses.replace(cut, **changes)

    monkeypatch.setattr(long_texts.LongTexts, "_cut_behind_word", wrong)
    text = TEXTS["prose"](0)
    ids, longest = in_pieces(encoder("Llama 3"), text, monkeypatch)
    assert ids == whole(encoder("Llama 3"), text)
    assert len(wrong_cuts) == min(n_wrong, len(wrong_cuts)) and longest <= (len(wrong_cuts) + 1) * PIECE + 1


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("run", [300, 601])
def test_a_run_that_ends_at_a_cut_joins_two_pieces(run: int, monkeypatch: pytest.MonkeyPatch):
    """The run's tokens are not those of its last characters, with which the cut is verified."""
    words = "x " * PIECE
    text = words[: PIECE - 1 - run] + "a" * run + "\n" + words + words
    ids, longest = in_pieces(encoder("Llama 3"), text, monkeypatch)
    assert ids == whole(encoder("Llama 3"), text)
    assert PIECE + 1 < longest <= 2 * PIECE + 1


@pytest.mark.usefixtures("small_pieces")
def test_a_text_whose_pieces_are_joined_too_often_is_tokenised_whole(monkeypatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(long_texts, "LARGE_PIECE", 4 * PIECE)
    find = long_texts.LongTexts._cut_behind_word

    def wrong(self, text: str, at: int):
        cut = find(self, text, at)
        return cut and dataclasses.replace(cut, after=10**6)

    monkeypatch.setattr(long_texts.LongTexts, "_cut_behind_word", wrong)
    text = TEXTS["prose"](0) * 5
    lengths = in_pieces(encoder("Llama 3"), text, monkeypatch)
    assert lengths == (whole(encoder("Llama 3"), text), len(text))
    assert f"{len(text)} characters of a document are tokenised at once" in caplog.text


@pytest.mark.usefixtures("small_pieces")
def test_progress_is_logged_while_a_document_is_tokenised(monkeypatch, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    text = TEXTS["prose"](0)
    encoder("Llama 3")([text])
    assert not caplog.records
    monkeypatch.setattr(long_texts, "PROGRESS_S", 0.0)
    encoder("Llama 3")([text])
    shares = [record.args[1] for record in caplog.records]
    assert len(shares) >= len(text) // PIECE - 1 and shares == sorted(shares) and 0 < shares[0] < shares[-1] < 100
    assert caplog.messages[0].startswith(f"tokenising a document of {len(text)} characters: ")


@pytest.mark.usefixtures("small_pieces")
def test_long_and_short_texts_keep_their_order():
    long, short = TEXTS["prose"](0), random_documents(0, 4)
    texts = [short[0], long, long + "x", *short[1:], long]
    expected = [i for text in texts for i in whole(Encoder(small_tokenizer()), text)]
    assert Encoder(small_tokenizer())(texts).tolist() == expected
