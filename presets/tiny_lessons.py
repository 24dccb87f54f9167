"""What the tiny preset's teacher is trained on: windows of documents, and in each where to look.

To answer a question that has choices, four layers have to work together. One looks back at the words just before. One
looks up what the asked name likes. One brings that value to the end of the question, and one finds the choice that is
this value and takes its letter. None of them earns anything before the others work, so training on whole questions
stays at chance. But a document shows where each has to look; taught that, all four are learned at once.

Shapes: B windows, S tokens, H heads, N looks of one head.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from presets import tiny_text as text

Maker = Callable[[random.Random], list[text.Piece]]
Kinds = tuple[tuple[int, Maker], ...]  # share and maker of each kind of document


# Documents


def repeats(low: int, high: int) -> Maker:
    return lambda rng: text.repeat_document(rng, rng.randint(low, high))


def recalls(low: int, high: int) -> Maker:
    return lambda rng: text.recall_document(rng, rng.randint(low, high))


def letters(low: int) -> Maker:
    return lambda rng: text.letters_document(rng, rng.randint(low, 4))


def whiches(low: int) -> Maker:
    return lambda rng: text.which_document(rng, rng.randint(low, 4))


def questions(facts: int) -> Maker:
    """Makes single questions about `facts` to 4 facts, without MMLU's heading."""
    return lambda rng: text.exam_document(rng, 1, rng.randint(facts, 4))[1:]


def exams(low: int, high: int) -> Maker:
    return lambda rng: text.exam_document(rng, rng.randint(low, high))


def passages(english: str) -> Maker:
    """Makes passages of the English that is trained on, from anywhere in a document."""
    documents, _ = text.split_english(english)

    def passage(rng: random.Random) -> list[text.Piece]:
        document = rng.choice(documents)
        start = rng.randrange(len(document)) if rng.random() < 0.5 else 0
        return [(document[start : start + 1500], 1.0)]  # more than a window holds

    return passage


# Where to look


class Look(NamedTuple):
    """Says that the token at `at` should attend to the token at `to`, in this head of this layer."""

    layer: int
    head: int
    at: int
    to: int


def looks(words: list[str]) -> list[Look]:
    """Returns where to look in a document, given as the words of its tokens.

    Layer 0 looks one token back and two tokens back, layer 1 from a question to the value of the name it asks about,
    layer 2 from the end of the choices to the question, and layer 3 to the choice that is the value.
    """
    found = [Look(0, 0, at, at - 1) for at in range(1, len(words))]
    found += [Look(0, 2, at, at - 2) for at in range(2, len(words))]
    asked, value = 0, ""  # the last question mark, and the word that answers it
    for at, word in enumerate(words):
        if word == "?" and words[at - 4 : at - 2] == [" What", " does"]:
            fact = last(words, words[at - 2], at - 2) + 2  # "Bob likes rose"
            asked, value = at, words[fact]
            found.append(Look(1, 0, at, fact))
        elif word == "?" and words[at - 2] == " is":
            asked, value = at, words[at - 1]
            if value in words[: at - 1]:  # the choices come before their questions
                found.append(Look(3, 0, at, last(words, value, at - 1)))
        elif word == ":" and words[at - 1] == "Answer":
            found += [Look(2, 0, at, asked), Look(3, 0, at, last(words, value, at))]
    return found


def last(words: list[str], word: str, before: int) -> int:
    """Returns the last index of a word before an index."""
    return before - 1 - words[before - 1 :: -1].index(word)


# Windows


@dataclass(frozen=True)
class Lesson:
    """Holds a batch: inputs, labels and the labels' weights in the loss, (B, S) each, and by layer and head the places
    to look at: window, token and the token it should attend to, (3, N).
    """

    inputs: Tensor
    labels: Tensor
    weights: Tensor
    looks: dict[tuple[int, int], Tensor]


class Lessons:
    """Draws batches of windows. Each window starts with a new document and cuts its last one."""

    def __init__(
        self,
        kinds: Kinds,
        shape: tuple[int, int],
        filler: float,
        tokenizer: PreTrainedTokenizerFast,
        shown: bool = False,
    ) -> None:
        """shape: windows in a batch and their tokens. filler: weight of tokens that cannot be found by looking back.
        shown: whether lessons say where to look, which is known in documents of notes, choices and questions only.
        """
        self.kinds, self.shape, self.filler, self.shown = kinds, shape, filler, shown
        self.encode = lru_cache(maxsize=100_000)(lambda piece: tokenizer(piece)["input_ids"])
        self.words = [tokenizer.decode([index]) for index in range(len(tokenizer))]
        self.end = tokenizer.eos_token_id

    def draw(self, rng: random.Random) -> Lesson:
        """Draws a batch."""
        ids, weights = [], []
        found: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for row in range(self.shape[0]):
            window, window_weights, window_looks = self._window(rng)
            ids.append(window)
            weights.append(window_weights)
            for layer, head, at, to in window_looks:
                found.setdefault((layer, head), []).append((row, at, to))
        tokens = torch.tensor(ids)  # (B, S + 1)
        by_head = {key: torch.tensor(places).T for key, places in found.items()}  # (3, N) each
        return Lesson(tokens[:, :-1], tokens[:, 1:], torch.tensor(weights)[:, 1:], by_head)

    def _window(self, rng: random.Random) -> tuple[list[int], list[float], list[Look]]:
        """Draws a window of one token more than inputs, the weights of its tokens, and where to look in its inputs."""
        size = self.shape[1]
        ids: list[int] = []
        weights: list[float] = []
        found: list[Look] = []
        while len(ids) <= size:
            start = len(ids)
            _, maker = rng.choices(self.kinds, [share for share, _ in self.kinds])[0]
            ids.append(self.end)
            weights.append(min(self.filler, 0.1))
            for piece, weight in maker(rng):
                piece_ids = self.encode(piece)
                ids += piece_ids
                weights += [self.filler if weight is None else weight] * len(piece_ids)
            if self.shown:
                document = [self.words[index] for index in ids[start:]]
                found += [Look(layer, head, start + at, start + to) for layer, head, at, to in looks(document)]
        return ids[: size + 1], weights[: size + 1], [look for look in found if look.at < size]
