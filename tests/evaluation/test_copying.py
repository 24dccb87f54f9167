"""The copying probe: what its texts are made of, and what models that copy all or nothing get."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from evaluation.copying import TEXTS, UNSCORED, WORDS, build_texts, one_token_words, probe
from inputs.option_values import PRESETS

TINY = PRESETS / "tiny" / "teacher"
N_SCORED = TEXTS * (WORDS - UNSCORED)


class WordTokenizer:
    """Has `n` words of one token each, in the spelling of a BPE or of SentencePiece, and a BOS if asked."""

    def __init__(self, n: int = 300, space: str = "Ġ", bos: bool = False) -> None:
        words = ["".join(chr(97 + i // 26**place % 26) for place in range(4)) for i in range(n)]
        self.tokens = ["<s>", "Ġof", "word", "Ġx1y2z", "Ġétés", *(space + word for word in words)]
        self.bos = [0] if bos else []

    def __len__(self) -> int:
        return len(self.tokens)

    def __call__(self, text: str) -> SimpleNamespace:
        assert text == ""
        return SimpleNamespace(input_ids=self.bos)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.tokens[i] for i in ids]


class Copier(nn.Module):
    """Predicts what followed the same token before; with `forgets`, token 0 instead for words that were said then."""

    def __init__(self, vocabulary: int, forgets: bool) -> None:
        super().__init__()
        self.vocabulary, self.forgets = vocabulary, forgets

    def base_model(self, ids, use_cache):
        tokens = ids[0].tolist()  # (L,)
        followers = dict(zip(tokens[:WORDS], tokens[1 : WORDS + 1], strict=True))
        found = [0 if self.forgets else followers.get(token, 0) for token in tokens]
        return SimpleNamespace(last_hidden_state=nn.functional.one_hot(torch.tensor([found]), self.vocabulary).float())

    def get_output_embeddings(self):
        return nn.Identity()


def scorer_of(tokenizer, forgets: bool = False) -> SimpleNamespace:
    model = Copier(len(tokenizer), forgets)
    return SimpleNamespace(
        tokenizer=tokenizer, model=model, device=torch.device("cpu"), tokens_run=0, tokens_plain=0, n_cut=0
    )


@pytest.mark.parametrize("space", ["Ġ", "▁"])
@pytest.mark.parametrize("bos", [False, True])
def test_a_text_is_different_words_said_twice(space, bos):
    tokenizer = WordTokenizer(space=space, bos=bos)
    words = one_token_words(tokenizer)
    assert words == list(range(5, 305))  # no short word, no part of one, no digits, no accents
    texts = build_texts(tokenizer, seed=0)
    assert len(texts) == TEXTS and texts == build_texts(tokenizer, seed=0) != build_texts(tokenizer, seed=1)
    for text in texts:
        assert text[: len(tokenizer.bos)] == tokenizer.bos
        said = text[len(tokenizer.bos) :]
        assert said == said[:WORDS] * 2 and len(set(said)) == WORDS and set(said) <= set(words)


@pytest.mark.parametrize("bos", [False, True])
def test_who_copies_has_1_and_who_forgets_has_0(bos):
    tokenizer = WordTokenizer(bos=bos)
    copies, forgets = scorer_of(tokenizer), scorer_of(tokenizer, forgets=True)
    assert probe(copies, 1000, seed=0) == {"words": WORDS, "acc": 1.0, "n": N_SCORED}
    assert probe(forgets, 1000, seed=0) == {"words": WORDS, "acc": 0.0, "n": N_SCORED}
    assert copies.tokens_run == TEXTS * (2 * WORDS - 1 + len(tokenizer.bos))


@pytest.mark.parametrize(("n_words", "max_length"), [(WORDS - 1, 1000), (300, 2 * WORDS - 2)])
def test_too_few_words_or_too_short_a_context_gives_no_accuracy(n_words, max_length):
    assert probe(scorer_of(WordTokenizer(n_words)), max_length, seed=0) == {"words": WORDS, "acc": None, "n": 0}
    assert probe(scorer_of(WordTokenizer(WORDS)), 2 * WORDS - 1, seed=0)["acc"] == 1.0  # the edges of both


def test_words_are_found_in_a_real_vocabulary():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    words = [tokenizer.decode([i]) for i in one_token_words(tokenizer)]
    assert " colours" in words and all(word[0] == " " and word[1:].isalpha() and len(word) > 4 for word in words)
