"""Texts with known answers, which attention finds by looking back: copying, where random words are said twice, and
retrieval, where a context states codes of names. All answers are scored at once, each given the right text before it.

Shapes: n rows of L tokens, padded on the right, where a causal model does not look. T tokens of a row are of answers.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from evaluation import copying, retrieval
from evaluation.held_out import wide_logits
from selection.statistics import estimate

ABOVE_CHANCE = 0.2  # a teacher that is right less often than chance and this cannot do a probe
NOT_AN_ANSWER = -1


class Score(NamedTuple):
    """Holds for each text of a probe the mean over its answers of -log p (nats), and the share of right ones: those of
    which every token is the likeliest.
    """

    loss: list[float]
    acc: list[float]


def estimates(scores: Mapping[str, Score]) -> dict[str, Any]:
    """Returns means and intervals over texts by the name of the probe, as JSON has them."""
    return {
        name: {"loss": estimate(score.loss)._asdict(), "acc": estimate(score.acc)._asdict()}
        for name, score in scores.items()
    }


@dataclass(frozen=True)
class Probe:
    """Holds the rows of a probe. text: of each row, which of the probe's texts it is of; rows of one text are not
    independent of each other. answer (n, L): which of a row's answers a token is of, or NOT_AN_ANSWER.
    """

    name: str
    ids: Tensor  # (n, L) int64
    answer: Tensor  # (n, L) int64
    text: tuple[int, ...]
    chance: float

    @property
    def n_texts(self) -> int:
        return len(set(self.text))

    def part(self, texts: range) -> "Probe":
        """Returns the probe of some of its texts."""
        rows = [row for row, text in enumerate(self.text) if text in texts]
        return Probe(self.name, self.ids[rows], self.answer[rows], tuple(self.text[row] for row in rows), self.chance)

    @torch.no_grad()
    def score(self, hidden: Tensor, head: nn.Linear) -> Score:
        """Returns the score of a model by its last hidden states, after the norm. hidden: (n, L, D) on any device."""
        losses: dict[int, list[Tensor]] = {}
        hits: dict[int, list[Tensor]] = {}
        for row, text in enumerate(self.text):
            place = (self.answer[row] != NOT_AN_ANSWER).nonzero()[:, 0]  # (T,)
            answer = self.answer[row, place].to(head.weight.device)  # (T,)
            read = hidden[row, (place - 1).to(hidden.device)].to(head.weight.device)  # (T, D)
            logits = wide_logits(read, head.weight, head.bias)  # (T, V)
            target = self.ids[row, place].to(logits.device)  # (T,)
            log_p = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]  # (T,)
            is_likeliest = (logits.argmax(-1) == target).to(log_p.dtype)
            zeros = log_p.new_zeros(int(answer.max()) + 1)  # (answers,)
            losses.setdefault(text, []).append(-zeros.index_add(0, answer, log_p))
            hits.setdefault(text, []).append((zeros + 1).scatter_reduce(0, answer, is_likeliest, "amin"))
        return Score(*([torch.cat(found[text]).mean().item() for text in sorted(found)] for found in (losses, hits)))


def repeated(sequences: Sequence[Sequence[int]], n_words: int, unscored: int, name: str = "copying") -> Probe:
    """Returns the probe of texts that end with `n_words` tokens said twice. The first `unscored` of the second round
    are no answers: by then a model may have noticed that they come again.
    """
    ids = torch.tensor(sequences)  # (n, L)
    answer = torch.full_like(ids, NOT_AN_ANSWER)
    answer[:, unscored - n_words :] = torch.arange(n_words - unscored)
    return Probe(name, ids, answer, tuple(range(len(ids))), 0.0)


def random_copies(words: Sequence[int], n_texts: int, n_words: int, unscored: int, seed: int) -> Probe:
    """Returns the copying probe of random token ids out of `words`, for a model without a tokenizer."""
    dice = random.Random(f"{seed} copying")
    return repeated([dice.sample(words, n_words) * 2 for _ in range(n_texts)], n_words, unscored)


def copying_probe(tokenizer: PreTrainedTokenizerBase, n_texts: int, seed: int) -> Probe | None:
    """Returns the copying probe, or None if the vocabulary has too few words of one token."""
    texts = copying.build_texts(tokenizer, seed, n_texts)
    return repeated(texts, copying.WORDS, copying.UNSCORED) if texts else None


def retrieval_probe(
    tokenizer: PreTrainedTokenizerBase, n_texts: int, length: int, n_pairs: int, seed: int
) -> Probe | None:
    """Returns the retrieval probe: contexts of at most `length` tokens, each with its questions and answers, one after
    another, so that it runs once for all of them. None if the pairs do not fit. An answer is right by itself, not as
    the likeliest of the context's codes.
    """
    room = length
    while True:
        texts = _questioned(tokenizer, n_texts, room, n_pairs, seed)
        longest = max((len(ids) for ids, _ in texts), default=0)
        if longest <= length:
            break
        room -= longest - length  # build_contexts leaves room for one question, not for all
    if not texts:
        return None
    padded = torch.zeros(len(texts), longest, dtype=torch.int64)  # (n, L)
    answer = torch.full_like(padded, NOT_AN_ANSWER)
    for row, (ids, places) in enumerate(texts):
        padded[row, : len(ids)] = torch.tensor(ids)
        for i, place in enumerate(places):
            answer[row, place] = i
    return Probe("retrieval", padded, answer, tuple(range(len(texts))), 1 / n_pairs)


def _questioned(
    tokenizer: PreTrainedTokenizerBase, n_texts: int, length: int, n_pairs: int, seed: int
) -> list[tuple[list[int], list[slice]]]:
    """Returns contexts of `length` tokens with their questions answered behind them: token ids, and the places of the
    answers in them.
    """
    n_questions = n_texts * min(retrieval.QUESTIONS_PER_CONTEXT, n_pairs)
    texts = []
    for context in retrieval.build_contexts(tokenizer, length, n_pairs, n_questions, seed):
        text, edges = context.text, []
        for question, code in retrieval.questions_of(context):
            text += question.removeprefix(context.text)
            edges.append((text, text + code))
            text += f"{code}."
        ids = tokenizer(text).input_ids
        places = [slice(*(_shared(tokenizer(edge).input_ids, ids) for edge in pair)) for pair in edges]
        texts.append((ids, places))
    return texts


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns how many token ids two texts begin with that are the same."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))
