"""The retrieval probe: what its contexts are made of, and what models that find everything or nothing get."""

import re

import pytest
from transformers import AutoTokenizer

from evaluation.retrieval import FILLERS, build_contexts, probe
from inputs.option_values import PRESETS

TINY = PRESETS / "tiny" / "teacher"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY, model_max_length=100_000)


class StandIn:
    """Returns a scorer that answers from the text alone."""

    def __init__(self, tokenizer, finds: bool) -> None:
        self.tokenizer, self.finds, self.prompts = tokenizer, finds, []

    def __call__(self, requests):
        self.prompts.append([request.prompt for request in requests])
        return [[self.score(request.prompt, text) for text in request.continuations] for request in requests]

    def score(self, prompt: str, text: str) -> float:
        question = prompt.splitlines()[-1]
        return float(f"{question}{text}." in prompt.splitlines()) if self.finds else 0.0


@pytest.mark.parametrize(("length", "n_pairs"), [(128, 2), (300, 8), (2000, 32)])
def test_contexts_are_as_long_as_asked_and_hold_every_pair_once(tokenizer, length, n_pairs):
    contexts = build_contexts(tokenizer, length, n_pairs, 10, seed=0)
    assert sum(len(context.asked) for context in contexts) == 10
    for context in contexts:
        lines = context.text.splitlines()
        pairs = [line for line in lines if line not in FILLERS]
        assert pairs == [f"The code of {n} is {c}." for n, c in zip(context.names, context.codes, strict=True)]
        assert len(set(context.names)) == len(set(context.codes)) == n_pairs
        assert len(set(context.asked)) == len(context.asked)
        asked = [f"The code of {context.names[i]} is {context.codes[i]}" for i in context.asked]
        used = max(len(tokenizer(f"{context.text}\n{question}").input_ids) for question in asked)
        assert length - 30 <= used <= length  # a filler is that long
    assert contexts == build_contexts(tokenizer, length, n_pairs, 10, seed=0)
    assert contexts != build_contexts(tokenizer, length, n_pairs, 10, seed=1)


def test_pairs_lie_all_over_the_context(tokenizer):
    places = []
    for context in build_contexts(tokenizer, 1000, 4, 80, seed=0):
        lines = context.text.splitlines()
        places += [i / len(lines) for i, line in enumerate(lines) if line not in FILLERS]
    assert min(places) < 0.1 and max(places) > 0.9 and 0.4 < sum(places) / len(places) < 0.6


def test_who_finds_everything_has_1_and_who_guesses_has_chance(tokenizer):
    finder, guesser = StandIn(tokenizer, True), StandIn(tokenizer, False)
    assert probe(finder, 400, 8, 50, seed=0) == {"length": 400, "pairs": 8, "acc": 1.0, "n": 50, "chance": 1 / 8}
    found = probe(guesser, 400, 4, 400, seed=0)
    assert found["acc"] == pytest.approx(0.25, abs=0.07) and found["n"] == 400
    prompts = finder.prompts[0]
    assert len(prompts) == 4 and len({re.sub(r"\n[^\n]*$", "", prompt) for prompt in prompts}) == 1  # one prefix


def test_pairs_that_do_not_fit_give_no_accuracy(tokenizer):
    found = probe(StandIn(tokenizer, True), 100, 64, 8, seed=0)
    assert (found["acc"], found["n"]) == (None, 0)
