"""MMLU's prompts against expected text, and its answers; test_lm_eval.py holds both against lm-evaluation-harness."""

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from evaluation import mmlu, mmlu_files
from evaluation.mmlu import GROUP_OF, Question
from evaluation.mmlu_files import Example, Subject
from tests.byte_tokenizers import TOKENIZERS
from tests.tiny import tiny_teacher

REAL_MMLU = Path(__file__).parents[2] / ".." / "shared" / "data" / "mmlu"
VOCAB = 300  # more than the tokenizers below need, as in a model whose vocabulary is padded
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_teacher(vocab_size=VOCAB, num_hidden_layers=2, max_position_embeddings=1024, initializer_range=0.3)


def make_questions() -> list[Question]:
    return [Question("st"[i % 2], i, f"{'ab cd ' * i}\nAnswer:", "ABCD"[i % 4]) for i in range(9)]


# Prompts


def test_the_prompt_byte_for_byte(mmlu_dir):
    subjects = mmlu_files.load_mmlu(mmlu_dir, ["world_geography"])
    questions = mmlu.build_questions(subjects, num_fewshot=2)
    assert questions[0] == Question(
        subject="world_geography",
        index=0,
        prompt=(
            "The following are multiple choice questions (with answers) about world geography.\n"
            "\n"
            "What is the capital of France?\n"
            "A. Lyon\n"
            "B.  Paris \n"
            "C. Nice, by the sea\n"
            "D. Lille\n"
            "Answer: B\n"
            "\n"
            'Who said\n"Here be dragons"?\n'
            "A. A sailor\n"
            "B. A king\n"
            "C. A map\n"
            "D. No one\n"
            "Answer: C\n"
            "\n"
            "Which is a river?\n"
            "A. Rhine\n"
            "B. Alps\n"
            "C. Ural, the hills\n"
            "D. Etna\n"
            "Answer:"
        ),
        answer="A",
    )
    assert [(q.index, q.answer) for q in questions] == [(0, "A"), (1, "C"), (2, "B")]


def test_zero_shot_has_no_examples(mmlu_dir):
    first, second = mmlu.build_questions(mmlu_files.load_mmlu(mmlu_dir, ["logic"]), num_fewshot=0)
    head = "The following are multiple choice questions (with answers) about logic.\n\n"
    assert second.prompt == head + "Two plus two?\nA. 1\nB. 2\r\n\nC. 3\nD. 4\nAnswer:"
    assert first.prompt.startswith(head + "Is p ")


def test_limit_counts_per_subject(mmlu_dir):
    questions = mmlu.build_questions(mmlu_files.load_mmlu(mmlu_dir), num_fewshot=1, limit=1)
    assert [(q.subject, q.index) for q in questions] == [("logic", 0), ("world_geography", 0)]


@pytest.mark.parametrize("num_fewshot", [3, -1])
def test_more_examples_than_dev_rows_is_an_error(mmlu_dir, num_fewshot):
    with pytest.raises(ValueError, match=f"--num_fewshot {num_fewshot}: logic has 2 dev rows"):
        mmlu.build_questions(mmlu_files.load_mmlu(mmlu_dir), num_fewshot=num_fewshot)


@pytest.mark.skipif(not REAL_MMLU.is_dir(), reason="../shared/data/mmlu, a part of the real MMLU, is not there")
def test_real_mmlu():
    astronomy = mmlu_files.load_mmlu(REAL_MMLU, ["astronomy"])
    questions = mmlu.build_questions(astronomy, num_fewshot=0)
    assert len(questions) == 152
    assert questions[0].prompt == (
        "The following are multiple choice questions (with answers) about astronomy.\n\n"
        'What is true for a type-Ia ("type one-a") supernova?\n'
        "A. This type occurs in binary systems.\n"
        "B. This type occurs in young galaxies.\n"
        "C. This type produces gamma-ray bursts.\n"
        "D. This type produces high amounts of X-rays.\n"
        "Answer:"
    )
    everything = mmlu_files.load_mmlu(REAL_MMLU)
    assert len(everything) == len(list((REAL_MMLU / "test").glob("*.csv")))
    assert all(q.prompt.count("\nAnswer:") == 6 for q in mmlu.build_questions(everything, num_fewshot=5))


# Scoring


def test_answers_stand_in_the_order_of_the_questions(model):
    """Subjects are scored one by one, and within them by length."""
    questions = make_questions()
    predictions = mmlu.score(model, TOKENIZERS["one token each"](), questions, None, CPU, None)
    assert [(p.subject, p.index, p.answer) for p in predictions] == [(q.subject, q.index, q.answer) for q in questions]
    for question, prediction in zip(questions, predictions, strict=True):
        (alone,) = mmlu.score(model, TOKENIZERS["one token each"](), [question], None, CPU, None)
        assert prediction.log_likelihoods == pytest.approx(alone.log_likelihoods, abs=1e-4)
        assert prediction.prediction == "ABCD"[alone.log_likelihoods.index(max(alone.log_likelihoods))]
    assert len({p.prediction for p in predictions}) > 1  # else a constant answer would pass


def test_a_fingerprint_differs_where_questions_do():
    questions = make_questions()
    prints = [mmlu.fingerprint(qs) for qs in (questions, questions[:-1], questions[::-1], make_questions())]
    assert prints[0] == prints[3] and len(set(prints)) == 3


def test_groups_are_those_of_mmlu():
    assert len(GROUP_OF) == 57
    sizes = {group: list(GROUP_OF.values()).count(group) for group in mmlu.GROUP_NAMES}
    assert sizes == {"stem": 19, "humanities": 13, "social sciences": 12, "other": 13}


def test_a_broken_model_is_not_taken_for_an_answer(model):
    broken = LlamaForCausalLM(model.config).eval()
    torch.nn.init.constant_(broken.lm_head.weight, math.nan)
    with pytest.raises(ValueError, match="llama: its logits are not finite"):
        mmlu.score(broken, TOKENIZERS["one token each"](), make_questions(), 8, CPU, None)


def test_equal_log_likelihoods_go_to_the_first_letter(model):
    flat = LlamaForCausalLM(model.config).eval()
    torch.nn.init.zeros_(flat.lm_head.weight)
    prediction, *_ = mmlu.score(flat, TOKENIZERS["one token each"](), make_questions(), 8, CPU, None)
    assert prediction.prediction == "A"
    # Every column of the head counts, those beyond the tokenizer's vocabulary too.
    assert prediction.log_likelihoods == pytest.approx([-math.log(VOCAB)] * 4, abs=1e-5)


def test_questions_and_examples_come_from_the_subject_given():
    dev = Example("d?", ("1", "2", "3", "4"), "D")
    (question,) = mmlu.build_questions([Subject("a_b_c", [dev], [dev])], num_fewshot=1)
    assert question.prompt.count(" about a b c.\n\n") == 1
    assert question.prompt.endswith("Answer: D\n\nd?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:")
