"""MMLU: prompts, scoring and aggregation, with the numbers of lm-evaluation-harness's `mmlu` task.
A prompt is scored against the four continuations " A" to " D"; the likeliest one is the model's answer.
Nothing here knows of command lines or ranks: `load_mmlu` -> `build_questions` -> `score` -> `aggregate`.

Shapes: B rows in a batch, S tokens, D hidden size, V columns of the head, T tokens of a continuation,
K continuations that one row scores, N = sum of T over a batch.
"""

import csv
import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class Example:
    """One row of a file, exactly as it stands there."""

    question: str
    choices: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Subject:
    name: str
    dev: list[Example]
    test: list[Example]


@dataclass(frozen=True)
class Question:
    """A test row made ready to score: `prompt` is all that comes before the answer letter's space."""

    subject: str
    index: int
    prompt: str
    answer: str


@dataclass(frozen=True)
class Prediction:
    subject: str
    index: int
    answer: str
    prediction: str
    log_likelihoods: tuple[float, ...]


# Loading


def load_mmlu(mmlu_dir: str | Path, subjects: Sequence[str] | None = None) -> list[Subject]:
    """Read `dev/<subject>_dev.csv` and `test/<subject>_test.csv`: all subjects, or those asked for."""
    root = Path(mmlu_dir)
    available = list_subjects(root)
    wanted = list(dict.fromkeys(subjects)) if subjects is not None else available
    if unknown := [name for name in wanted if name not in available]:
        raise ValueError("; ".join(_unknown_subject(name, available) for name in unknown))
    return [
        Subject(name, _read_rows(root / "dev" / f"{name}_dev.csv"), _read_rows(root / "test" / f"{name}_test.csv"))
        for name in wanted
    ]


def list_subjects(mmlu_dir: str | Path) -> list[str]:
    """The names of the subjects in a folder, sorted; each needs both of its files."""
    found: dict[str, set[str]] = {}
    for split in ("dev", "test"):
        folder = Path(mmlu_dir) / split
        names = {path.name.removesuffix(f"_{split}.csv") for path in folder.glob(f"*_{split}.csv")}
        if not names:
            state = f"holds no *_{split}.csv" if folder.is_dir() else "is not a folder"
            raise ValueError(
                f"--mmlu_dir {mmlu_dir}: {folder} {state}; give a folder in MMLU's original layout, "
                "dev/<subject>_dev.csv and test/<subject>_test.csv"
            )
        found[split] = names
    if unpaired := sorted(found["dev"] ^ found["test"]):
        raise ValueError(f"--mmlu_dir {mmlu_dir}: dev/ and test/ do not both have {', '.join(unpaired)}")
    return sorted(found["test"])


def _unknown_subject(name: str, available: list[str]) -> str:
    near = difflib.get_close_matches(name, available, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(available)}"
    return f"--subjects {name}: no such subject; {hint}"


def _read_rows(path: Path) -> list[Example]:
    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for index, row in enumerate(csv.reader(file)):
                if len(row) != 6 or row[5] not in LETTERS:
                    raise ValueError(
                        f"{path}, row {index} (counted from 0): expected a question, four choices and a "
                        f"letter A to D, got {len(row)} fields, the last of them {row[-1:]}"
                    )
                rows.append(Example(question=row[0], choices=tuple(row[1:5]), answer=row[5]))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, row {len(rows)} (counted from 0) or later: {error}") from error
    if not rows:
        raise ValueError(f"{path}: expected at least one row, the file is empty")
    return rows


# Prompts


def build_questions(subjects: Iterable[Subject], num_fewshot: int, limit: int | None = None) -> list[Question]:
    """Prompts in file order; `limit` keeps the first so many questions of each subject."""
    questions = []
    for subject in subjects:
        head = _prompt_head(subject, num_fewshot)
        for index, example in enumerate(subject.test[:limit]):
            prompt = head + _format_question(example)
            questions.append(Question(subject.name, index, prompt, example.answer))
    return questions


def _prompt_head(subject: Subject, num_fewshot: int) -> str:
    """What all prompts of a subject share: the description and the answered examples."""
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
    # Only the question is stripped, choices keep their spaces: so does lm-eval's template.
    choices = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, example.choices, strict=True))
    return f"{example.question.strip()}\n{choices}Answer:"


# Scoring


@dataclass(frozen=True)
class Row:
    """One sequence to run through the model, and the tokens to look up at its last T positions."""

    question: int  # its place in the list of questions
    choices: tuple[int, ...]  # which of the four continuations it scores: K of them
    input_ids: Tensor  # (S,)
    targets: Tensor  # (T, K)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    batch_size: int,
    device: torch.device | str,
    max_length: int | None,
) -> list[Prediction]:
    """The log-likelihood of each continuation after its prompt, in the order of `questions`.

    Prompts longer than `max_length` lose tokens on the left; None means that the model has no limit.
    """
    assert not model.training, "score needs a model in eval mode"
    rows = [row for i, question in enumerate(questions) for row in _encode(tokenizer, question, i, max_length)]
    _check_vocabulary(model, rows)
    # Neighbours in length share a batch, so little is padded; the longest come first, so that a batch
    # that does not fit in memory fails at once.
    rows.sort(key=lambda row: -len(row.input_ids))
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]

    scores = [[math.nan] * len(LETTERS) for _ in questions]
    for batch in tqdm(batches, desc="mmlu", unit="batch", disable=None):
        for row, values in zip(batch, _score_batch(model, batch, device), strict=True):
            for choice, value in zip(row.choices, values, strict=True):
                scores[row.question][choice] = value
    return [_predict(question, tuple(values)) for question, values in zip(questions, scores, strict=True)]


def _encode(tokenizer: PreTrainedTokenizerBase, question: Question, position: int, max_length: int | None) -> list[Row]:
    """As lm-eval does: a continuation's tokens are those of the whole beyond the count of the context's.

    That holds for tokenizers that need several tokens for " A", and it adds a BOS where the tokenizer does by
    default. Continuations that differ in their last token alone need the same forward, and share a row.
    """
    context, *wholes = tokenizer([question.prompt, *(f"{question.prompt} {c}" for c in LETTERS)]).input_ids
    shared: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for choice, whole in enumerate(wholes):
        continuation = whole[len(context) :]
        if not continuation:
            raise ValueError(f"the tokenizer has no token of its own for ' {LETTERS[choice]}' after a prompt")
        if max_length is not None and len(continuation) > max_length:
            raise ValueError(f"--max_length {max_length}: an answer alone is {len(continuation)} tokens long")
        key = (len(continuation), *context, *continuation[:-1])
        shared.setdefault(key, []).append((choice, continuation))
    rows = []
    for (_, *inputs), members in shared.items():
        # The last token is only ever predicted, so `max_length` bounds the inputs without it.
        kept = inputs if max_length is None else inputs[-max_length:]
        targets = torch.tensor([continuation for _, continuation in members]).T  # (T, K)
        rows.append(Row(position, tuple(choice for choice, _ in members), torch.tensor(kept), targets))
    return rows


def _check_vocabulary(model: PreTrainedModel, rows: list[Row]) -> None:
    # On a GPU an id out of range would end as a device-side assert, far from its cause.
    largest = max((int(max(row.input_ids.max(), row.targets.max())) for row in rows), default=0)
    known = len(next(model.get_input_embeddings().parameters()))
    if largest >= known:
        raise ValueError(f"the tokenizer gives token {largest}, the model knows {known}: they do not belong together")


@torch.inference_mode()
def _score_batch(model: PreTrainedModel, rows: list[Row], device: torch.device | str) -> list[list[float]]:
    """For each row, the summed log-likelihood of its K continuations."""
    # On the right of a causal model's input, padding changes nothing before it: no mask, and any id will do.
    input_ids = torch.nn.utils.rnn.pad_sequence([row.input_ids for row in rows], batch_first=True)
    hidden = model.base_model(input_ids=input_ids.to(device), use_cache=False).last_hidden_state  # (B, S, D)
    # The head sees the predicting positions only: logits for all of them would be (B, S, V).
    ends = [(len(row.input_ids), len(row.targets)) for row in rows]
    picked = torch.cat([hidden[i, end - count : end] for i, (end, count) in enumerate(ends)])  # (N, D)
    # All V columns count, padded ones too: the model's own distribution has them, and so has lm-eval's.
    log_probs = model.get_output_embeddings()(picked).float().log_softmax(dim=-1)  # (N, V)
    parts = log_probs.split([count for _, count in ends])
    sums = [
        part.gather(1, row.targets.to(device)).sum(dim=0) for part, row in zip(parts, rows, strict=True)
    ]  # B of (K,)
    values = iter(torch.cat(sums).tolist())
    return [[next(values) for _ in row.choices] for row in rows]


def _predict(question: Question, log_likelihoods: tuple[float, ...]) -> Prediction:
    if not all(math.isfinite(value) for value in log_likelihoods):
        raise ValueError(
            f"{question.subject}, row {question.index}: the model gives log-likelihoods {log_likelihoods}; "
            "its weights or its dtype are broken"
        )
    best = max(range(len(LETTERS)), key=lambda i: log_likelihoods[i])  # the first of equals, like np.argmax
    return Prediction(question.subject, question.index, question.answer, LETTERS[best], log_likelihoods)


# Aggregation


def aggregate(predictions: Sequence[Prediction]) -> dict:
    """`acc`, its sample standard error, `n`, and `subjects` {name: {acc, n}}, over all questions alike.

    The standard error is that of a mean, as lm-eval gives per task; one question has none (None).
    """
    assert predictions, "nothing to aggregate"
    hits: dict[str, list[bool]] = {}
    for prediction in predictions:
        hits.setdefault(prediction.subject, []).append(prediction.prediction == prediction.answer)
    n = len(predictions)
    acc = sum(map(sum, hits.values())) / n
    return {
        "acc": acc,
        "stderr": math.sqrt(acc * (1 - acc) / (n - 1)) if n > 1 else None,
        "n": n,
        "subjects": {name: {"acc": sum(right) / len(right), "n": len(right)} for name, right in hits.items()},
    }
