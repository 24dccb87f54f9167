"""Probes against small models that know all answers, and against the tokenizer of a preset."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from evaluation.copying import UNSCORED, WORDS
from inputs.option_values import PRESETS
from selection.probes import copying_probe, random_copies, repeated, retrieval_probe
from tests.byte_tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PRESETS / "tiny" / "teacher")


def score(probe, wrong=()):
    """Returns the score of a model that is sure of each next token; of `wrong` (row, position) it is sure of 0."""
    vocabulary = max(30, int(probe.ids.max()) + 1)
    following = probe.ids.roll(-1, dims=1)
    for row, position in wrong:
        following[row, position - 1] = 0
    head = nn.Linear(vocabulary, vocabulary, bias=False)
    head.weight.data = 5 * torch.eye(vocabulary)
    return probe.score(nn.functional.one_hot(following, vocabulary).float(), head)


def test_words_are_said_twice_and_the_second_are_answers(tokenizer):
    probe = copying_probe(tokenizer, 3, seed=1)
    assert probe.n_texts == 3 and probe.chance == 0
    said = probe.ids[:, -2 * WORDS :]
    assert torch.equal(said[:, :WORDS], said[:, WORDS:])
    assert (probe.answer >= 0).sum(1).tolist() == [WORDS - UNSCORED] * 3
    assert score(probe).acc == [1, 1, 1]
    assert copying_probe(byte_tokenizer([], bos=True), 3, seed=1) is None  # has no words


def test_each_question_has_its_code_as_its_answer(tokenizer):
    probe = retrieval_probe(tokenizer, 2, 200, 4, seed=1)
    assert probe.text == (0, 1) and probe.chance == 0.25 and probe.ids.shape[1] <= 200
    codes = set()
    for ids, answer in zip(probe.ids, probe.answer, strict=True):
        for question in range(4):
            code = tokenizer.decode(ids[answer == question])
            assert code.strip().isdigit() and len(code.strip()) == 3
            text = tokenizer.decode(ids[: int((answer == question).nonzero().max()) + 1])
            assert text.count(f"{code}") == 2  # where it is stated, and at the end
            codes.add(code)
    assert len(codes) == 8 and retrieval_probe(tokenizer, 2, 40, 4, seed=1) is None


def test_an_answer_is_right_if_all_its_tokens_are(tokenizer):
    probe = retrieval_probe(tokenizer, 2, 200, 4, seed=1)
    places = [(row, int((probe.answer[row] == question).nonzero()[0])) for row, question in ((0, 1), (1, 0), (1, 1))]
    assert score(probe, places).acc == [0.75, 0.5]
    sure = score(probe)
    assert sure.acc == [1, 1] and max(sure.loss) < 12 and score(probe, places).loss[1] > sure.loss[1] + 2


def test_logits_of_16_bits_are_not_rounded():
    """In bfloat16 both logits would be 16, and the first token the likeliest."""
    head = nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    head.weight.data = torch.tensor([[16.0, 0.0], [16.0, 0.03125]], dtype=torch.bfloat16)
    probe = repeated([[1, 1]], 1, 0)
    found = probe.score(torch.ones(1, 2, 2, dtype=torch.bfloat16), head)
    assert found.acc == [1] and found.loss[0] == pytest.approx(math.log1p(math.exp(-0.03125)))


def test_the_units_are_texts():
    probe = random_copies(range(30), 3, 10, 4, seed=0)
    assert probe.ids.shape == (3, 20) and (probe.answer >= 0).sum() == 18
    position = 16  # the third of six answers
    found = score(probe, [(1, position)])
    assert found.acc == pytest.approx([1, 5 / 6, 1]) and found.loss[0] == pytest.approx(found.loss[2])
    part = probe.part(range(1, 3))
    assert part.n_texts == 2 and torch.equal(part.ids, probe.ids[1:])
    assert score(part, [(0, position)]).loss == pytest.approx(found.loss[1:])
    assert torch.equal(repeated(probe.ids.tolist(), 10, 4).answer, probe.answer)
