"""Probes key-value retrieval: a context states the codes of some names among unrelated sentences, and the model has to
give the code of one name. The answer has to be copied from far back. Attention does this easily; a recurrent state only
while it has room for the pairs (arXiv 2504.18574, 2602.11374). Accuracy over the length of the context and the number
of pairs shows where a hybrid stands between the two.
"""

import random
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from evaluation.scoring import Request, Scorer

QUESTIONS_PER_CONTEXT = 4  # a context runs once for all of them
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
    """Holds a text that states pairs, in the order of `names` and `codes`; `asked` are the indices of the questions."""

    text: str
    names: list[str]
    codes: list[str]
    asked: list[int]


def probe(scorer: Scorer, length: int, n_pairs: int, n_questions: int, seed: int) -> dict[str, Any]:
    """Returns the accuracy `acc` of the likeliest of a context's codes, beside `chance`, which is 1 / n_pairs. `acc` is
    None if `n_questions` is 0 or the pairs alone are longer than `length` tokens.
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
    """Returns contexts for `n_questions`. Each, with a question and its answer, has `length` tokens or a few fewer; the
    list is empty if the pairs do not fit. They are the same for every model and on every machine.
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
        while fillers and _tokens(tokenizer, lines, ends) > length:  # a filler's tokens depend on the text around it
            lines.remove(fillers.pop())
        if _tokens(tokenizer, lines, ends) > length:
            return []
        contexts.append(Context("\n".join(lines), names, codes, asked))
    return contexts


def questions_of(context: Context) -> list[tuple[str, str]]:
    """Returns the questions of a context, each with its answer: a prompt that ends before the code, and " " and it."""
    return [(f"{context.text}\n{_statement(context.names[i])}", f" {context.codes[i]}") for i in context.asked]


def _tokens(tokenizer: PreTrainedTokenizerBase, lines: list[str], ends: list[str]) -> int:
    """Returns the number of tokens of the lines with the longest of the ends."""
    return max(len(tokenizer("\n".join([*lines, end])).input_ids) for end in ends)


def _statement(name: str) -> str:
    return f"The code of {name} is"


def _names(dice: random.Random, n: int) -> list[str]:
    """Returns n different names, made up, so that no model has seen them in training."""
    names: dict[str, None] = {}
    while len(names) < n:
        letters = [dice.choice(CONSONANTS if i % 2 == 0 else VOWELS) for i in range(5)]
        names["".join(letters).capitalize()] = None
    return list(names)


def _fillers(dice: random.Random, tokenizer: PreTrainedTokenizerBase, room: int) -> list[str]:
    """Returns sentences of `room` tokens in all, or a few fewer. Each is counted as it would be after another one."""
    start = len(tokenizer(FILLERS[0]).input_ids)
    added = {filler: len(tokenizer(f"{FILLERS[0]}\n{filler}").input_ids) - start for filler in FILLERS}
    chosen: list[str] = []
    while room >= max(added.values()):
        chosen.append(dice.choice(FILLERS))
        room -= added[chosen[-1]]
    return chosen


def _scatter(dice: random.Random, pairs: list[str], fillers: list[str]) -> list[str]:
    """Returns the pairs at random places among the fillers; each kind keeps its order."""
    is_pair = [True] * len(pairs) + [False] * len(fillers)
    dice.shuffle(is_pair)
    remaining = {True: iter(pairs), False: iter(fillers)}
    return [next(remaining[kind]) for kind in is_pair]
