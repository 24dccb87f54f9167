"""Key-value retrieval: a context states the codes of some names among sentences that have nothing to do with them, and
the model is asked for the code of one. To answer it has to fetch a token from far back, which attention does with ease
and a recurrent state only as far as it has room (arXiv 2504.18574, 2602.11374). Accuracy over the length of the context
and the number of pairs shows where a hybrid stands between the two.
"""

import random
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from evaluation.scoring import Request, Scorer

QUESTIONS_PER_CONTEXT = 4  # which share its run
FILLERS = (
    "The wind turned to the west before noon.",
    "Two boats lay upside down on the sand.",
    "Nobody had swept the yard since spring.",
    "A door was open and the room behind it dark.",
    "They talked about the harvest and the roads.",
    "It had rained for three days in the valley.",
    "The old bridge was closed to heavy carts.",
    "Someone laughed on the other side of the wall.",
)
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Context:
    """A text with pairs in it, in the order of `names` and `codes`; `asked` are the places of those asked for."""

    text: str
    names: list[str]
    codes: list[str]
    asked: list[int]


def probe(scorer: Scorer, length: int, n_pairs: int, n_questions: int, seed: int) -> dict[str, Any]:
    """Accuracy of the likeliest of the context's codes, `chance` being one in n_pairs. `acc` is None where the pairs
    alone are longer than `length`.
    """
    right = n = 0
    for context in build_contexts(scorer.tokenizer, length, n_pairs, n_questions, seed):
        continuations = tuple(f" {code}" for code in context.codes)
        requests = [Request(f"{context.text}\n{_statement(context.names[i])}", continuations) for i in context.asked]
        for i, log_likelihoods in zip(context.asked, scorer(requests), strict=True):
            n += 1
            right += log_likelihoods.index(max(log_likelihoods)) == i
    return {"length": length, "pairs": n_pairs, "acc": right / n if n else None, "n": n, "chance": 1 / n_pairs}


def build_contexts(
    tokenizer: PreTrainedTokenizerBase, length: int, n_pairs: int, n_questions: int, seed: int
) -> list[Context]:
    """As many as `n_questions` take, each with a question and its answer of `length` tokens or a few fewer; none if the
    pairs do not fit into that. The same for every model and on every machine.
    """
    dice = random.Random(f"{seed} {length} {n_pairs}")
    per_context = min(QUESTIONS_PER_CONTEXT, n_pairs)
    contexts = []
    for first in range(0, n_questions, per_context):
        names, codes = _names(dice, n_pairs), [str(code) for code in dice.sample(range(100, 1000), n_pairs)]
        pairs = [f"{_statement(name)} {code}." for name, code in zip(names, codes, strict=True)]
        asked = dice.sample(range(n_pairs), min(per_context, n_questions - first))
        ends = [f"{_statement(names[i])} {codes[i]}" for i in asked]
        room = length - _tokens(tokenizer, pairs, ends)
        fillers = _fillers(dice, tokenizer, room)
        lines = _scatter(dice, pairs, fillers)
        while fillers and _tokens(tokenizer, lines, ends) > length:  # what a filler adds depends on what is around it
            lines.remove(fillers.pop())
        if _tokens(tokenizer, lines, ends) > length:
            return []
        contexts.append(Context("\n".join(lines), names, codes, asked))
    return contexts


def _tokens(tokenizer: PreTrainedTokenizerBase, lines: list[str], ends: list[str]) -> int:
    """Of the lines with the longest of the ends."""
    return max(len(tokenizer("\n".join([*lines, end])).input_ids) for end in ends)


def _statement(name: str) -> str:
    return f"The code of {name} is"


def _names(dice: random.Random, n: int) -> list[str]:
    """Made up, so that no model knows anything of them, and all different."""
    names: dict[str, None] = {}
    while len(names) < n:
        letters = [dice.choice(CONSONANTS if i % 2 == 0 else VOWELS) for i in range(5)]
        names["".join(letters).capitalize()] = None
    return list(names)


def _fillers(dice: random.Random, tokenizer: PreTrainedTokenizerBase, room: int) -> list[str]:
    """Sentences that take `room` tokens, or a few fewer. What each adds is counted once, after another one."""
    start = len(tokenizer(FILLERS[0]).input_ids)
    added = {filler: len(tokenizer(f"{FILLERS[0]}\n{filler}").input_ids) - start for filler in FILLERS}
    chosen: list[str] = []
    while room >= max(added.values()):
        chosen.append(dice.choice(FILLERS))
        room -= added[chosen[-1]]
    return chosen


def _scatter(dice: random.Random, pairs: list[str], fillers: list[str]) -> list[str]:
    """The pairs at random places among the fillers, both in their order."""
    is_pair = [True] * len(pairs) + [False] * len(fillers)
    dice.shuffle(is_pair)
    remaining = {True: iter(pairs), False: iter(fillers)}
    return [next(remaining[kind]) for kind in is_pair]
