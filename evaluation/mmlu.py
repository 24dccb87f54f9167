"""MMLU: its groups, prompts and scores, with the numbers of lm-evaluation-harness's `mmlu` task. The four continuations
" A" to " D" of a prompt are scored; the likeliest is the model's answer. `load_mmlu` returns subjects,
`build_questions` questions, `score` predictions; statistics.py computes accuracies from those.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.mmlu_files import LETTERS, Example, Subject
from evaluation.scoring import Request, Scorer

PROMPT = "lm-evaluation-harness, task mmlu (default), version 1"
GROUP_NAMES = {
    "stem": """
        abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning""",
    "humanities": """
        formal_logic high_school_european_history high_school_us_history high_school_world_history international_law
        jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law
        world_religions""",
    "social sciences": """
        econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics
        high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations
        security_studies sociology us_foreign_policy""",
    "other": """
        business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
        medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology""",
}
GROUP_OF = {subject: group for group, names in GROUP_NAMES.items() for subject in names.split()}


@dataclass(frozen=True)
class Question:
    """Holds a test row ready to score; `prompt` ends before the space in front of the answer letter."""

    subject: str
    index: int
    prompt: str
    answer: str


@dataclass(frozen=True)
class Prediction:
    """Holds a model's answer to a question; `index` is the row in its file, from 0."""

    subject: str
    index: int
    answer: str
    prediction: str
    log_likelihoods: tuple[float, ...]


# Prompts


def build_questions(subjects: Iterable[Subject], num_fewshot: int, limit: int | None = None) -> list[Question]:
    """Returns questions in file order; `limit` keeps the first so many of each subject. Raises ValueError if a subject
    has fewer than `num_fewshot` examples.
    """
    questions = []
    for subject in subjects:
        head = _prompt_head(subject, num_fewshot)
        for index, example in enumerate(subject.test[:limit]):
            prompt = head + _format_question(example)
            questions.append(Question(subject.name, index, prompt, example.answer))
    return questions


def _prompt_head(subject: Subject, num_fewshot: int) -> str:
    """Returns what all prompts of a subject share: the description and the answered examples."""
    if not 0 <= num_fewshot <= len(subject.dev):
        raise ValueError(
            f"--num_fewshot {num_fewshot}: {subject.name} has {len(subject.dev)} dev rows to draw from; "
            f"ask for 0 to {len(subject.dev)}"
        )
    topic = subject.name.replace("_", " ")
    description = f"The following are multiple choice questions (with answers) about {topic}.\n\n"
    return description + "".join(
        f"{_format_question(example)} {example.answer}\n\n" for example in subject.dev[:num_fewshot]
    )


def _format_question(example: Example) -> str:
    # As in lm-eval's template, only the question is stripped; choices keep their spaces.
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, example.choices, strict=True))
    return f"{example.question.strip()}\n{choices}Answer:"


def fingerprint(questions: Iterable[Question]) -> str:
    """Returns the SHA-256 of all prompts and answers: two scores with the same one are of the same questions."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(f"{question.prompt}\0{question.answer}\0".encode())
    return digest.hexdigest()


# Scoring


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    batch_size: int | None,
    device: torch.device,
    max_length: int | None,
) -> list[Prediction]:
    """Returns the model's answer to each question, in their order. batch_size, max_length: as in `scoring.Scorer`."""
    return answer(Scorer(model, tokenizer, device, batch_size, max_length), questions)


def answer(scorer: Scorer, questions: Sequence[Question]) -> list[Prediction]:
    """Returns what `score` does, by a scorer that exists. Runs subject by subject, whose prompts begin alike."""
    by_subject: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        by_subject.setdefault(question.subject, []).append(i)
    predictions: dict[int, Prediction] = {}
    for members in by_subject.values():
        continuations = tuple(f" {letter}" for letter in LETTERS)
        results = scorer([Request(questions[i].prompt, continuations) for i in members])
        for i, log_likelihoods in zip(members, results, strict=True):
            predictions[i] = _predict(questions[i], tuple(log_likelihoods))
    return [predictions[i] for i in range(len(questions))]


def _predict(question: Question, log_likelihoods: tuple[float, ...]) -> Prediction:
    best = max(range(len(LETTERS)), key=lambda i: log_likelihoods[i])  # the first of equals, like np.argmax
    return Prediction(question.subject, question.index, question.answer, LETTERS[best], log_likelihoods)
