"""Probes copying: random words are said twice, and in the second round each next word is known from the first.
Attention heads that look up what followed a word do this (arXiv 2209.11895); a recurrent state has to keep all words.
The KL on text hardly sees it: a layer whose replacement costs little KL may carry all of a model's copying.
"""

import random
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from evaluation.scoring import Scorer

WORDS, TEXTS = 120, 4
UNSCORED = 20  # words of the second round: by then a model may have noticed that they come again
COMMONEST = 8000  # words to draw from; a vocabulary lists common ones first
SHORTEST = 4  # letters
SPACES = ("Ġ", "▁")  # what begins a token that begins with a space, in vocabularies of BPE and of SentencePiece


def probe(scorer: Scorer, max_length: int, seed: int) -> dict[str, Any]:
    """Returns the share `acc` of `n` words for which the model's likeliest next token is right. `acc` is None if the
    vocabulary has too few words of one token, or if all words twice are longer than `max_length` tokens.
    """
    texts = build_texts(scorer.tokenizer, seed)
    if not texts or len(texts[0]) - 1 > max_length:
        return {"words": WORDS, "acc": None, "n": 0}
    right = sum(_count_right(scorer, text) for text in texts)
    n = TEXTS * (WORDS - UNSCORED)
    return {"words": WORDS, "acc": right / n, "n": n}


def build_texts(tokenizer: PreTrainedTokenizerBase, seed: int, n_texts: int = TEXTS) -> list[list[int]]:
    """Returns lists of token ids, WORDS different ones twice, after a BOS where the tokenizer adds one; an empty list
    if there are too few words.
    """
    words = one_token_words(tokenizer)[:COMMONEST]
    if len(words) < WORDS:
        return []
    dice, beginning = random.Random(f"{seed} copying"), tokenizer("").input_ids
    return [[*beginning, *(dice.sample(words, WORDS) * 2)] for _ in range(n_texts)]


def one_token_words(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids of tokens that are a space and a word, in the order of the vocabulary."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [i for i, token in enumerate(tokens) if token and token[0] in SPACES and _is_word(token[1:])]


def _is_word(text: str) -> bool:
    return len(text) >= SHORTEST and text.isascii() and text.isalpha()


@torch.inference_mode()
def _count_right(scorer: Scorer, text: list[int]) -> int:
    """Returns how many of the last WORDS - UNSCORED tokens are the likeliest after those before them."""
    ids = torch.tensor([text], device=scorer.device)  # (1, L)
    targets = ids[0, UNSCORED - WORDS :]  # (T,)
    hidden = scorer.model.base_model(ids[:, :-1], use_cache=False).last_hidden_state[0, -len(targets) :]  # (T, D)
    logits = scorer.model.get_output_embeddings()(hidden)  # (T, V)
    scorer.tokens_run += len(text) - 1
    scorer.tokens_plain += len(text) - 1
    return int((logits.argmax(-1) == targets).sum())
