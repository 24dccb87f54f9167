"""The text of the tiny preset: what its teacher is trained on, what the demo distils on, and its MMLU files.

English comes from a copy of a part of Python's documentation (`tiny/text/english.txt`). The rest is generated: notes
that state who likes what, questions about them with and without choices, lists of lettered choices, and words said
twice. The answers cannot be memorised; they have to be retrieved from the text before them. A recurrent student lacks
this ability, and a few attention layers restore it.

Every test question asks about a (name, value) pair that `is_reserved`, and no generated training document states one,
so no test question can have been seen in training.
"""

import csv
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

LETTERS = "ABCD"
FIRST_NAMES = (
    "Ann Ben Bob Cat Dan Eve Fay Guy Hal Ian Jan Jim Joe Kay Ken Kim Lee Leo Liz Lou "
    "Mac Max May Meg Mia Nan Ned Pam Pat Pia Ray Rob Ron Roy Sam Sue Tim Tom Una Zoe"
)
COLOURS = "red blue green black white pink gold grey brown lime navy tan teal rose plum ruby mint sand jade wine"
ANIMALS = "dogs cats cows pigs bees ants owls bats rats hens deer fish frogs wolf bear lion hare mice seal crab"
MEALS = "rice soup bread cake corn beans meat eggs figs nuts peas pie ham jam kale leek oats tofu stew pears"
TOOLS = "rope nail saw axe lamp pump drill file hook knife glue tape wire bolt chain brush spade key fork tongs"
NAMES = tuple(FIRST_NAMES.split())

# A document is a list of pieces: a text, and the weight of its tokens in the teacher's loss. Answers that can be found
# by looking back have the weight ANSWER, the letter after the choices CHOICE; for FILLER, the stage sets the weight.
Piece = tuple[str, float | None]
FILLER, ANSWER, CHOICE = None, 1.0, 3.0


@dataclass(frozen=True)
class Subject:
    """Holds the words of an MMLU subject: `{name} {states} {value}.` in a note, `What does {name} {asks}?` to ask."""

    name: str
    states: str
    asks: str
    values: tuple[str, ...]


SUBJECTS = (
    Subject("colours", "likes", "like", tuple(COLOURS.split())),
    Subject("animals", "sees", "see", tuple(ANIMALS.split())),
    Subject("meals", "eats", "eat", tuple(MEALS.split())),
    Subject("tools", "has", "have", tuple(TOOLS.split())),
)
WORDS = [*NAMES, *(value for subject in SUBJECTS for value in subject.values)]


@dataclass(frozen=True)
class Question:
    """Holds a question with its choices and the letter of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: str  # letter

    @property
    def value(self) -> str:
        return self.choices[LETTERS.index(self.answer)]

    def pieces(self, rng: random.Random) -> list[Piece]:
        """Returns the solved question."""
        pass_over(rng, 1 + len(self.choices))
        pieces: list[Piece] = [(self.text, FILLER)]
        for letter, choice in zip(LETTERS[: len(self.choices)], self.choices, strict=True):
            pieces.append((f"\n{letter}. {choice}", FILLER))
        return [*pieces, ("\nAnswer:", FILLER), (f" {self.answer}", CHOICE)]


def pass_over(rng: random.Random, count: int) -> None:
    """Draws numbers that are not used. The committed text was drawn when documents had variants that are gone: without
    these draws it would be another text.
    """
    for _ in range(count):
        rng.random()


def is_reserved(name: str, subject: Subject, value: str) -> bool:
    """Returns True for one pair in five: those that test questions ask about."""
    return (NAMES.index(name) + subject.values.index(value)) % 5 == 0


def draw_facts(rng: random.Random, subject: Subject, count: int) -> dict[str, str]:
    """Draws `count` distinct names with distinct values, none of the pairs reserved."""
    names = rng.sample(NAMES, count)
    while True:
        values = rng.sample(subject.values, count)
        if not any(is_reserved(name, subject, value) for name, value in zip(names, values, strict=True)):
            return dict(zip(names, values, strict=True))


def draw_question(rng: random.Random, subject: Subject, facts: int = 4, reserved: bool = False) -> Question:
    """Draws a question whose choices are the values in its note; with `reserved`, it asks about a reserved pair."""
    stated = draw_facts(rng, subject, facts)
    name = rng.choice(list(stated))
    if reserved:
        others = {value for other, value in stated.items() if other != name}
        stated[name] = rng.choice([v for v in subject.values if is_reserved(name, subject, v) and v not in others])
    choices = rng.sample(sorted(stated.values()), facts)
    note = "".join(f" {other} {subject.states} {value}." for other, value in stated.items())
    text = f"Note:{note} What does {name} {subject.asks}?"
    return Question(text, tuple(choices), LETTERS[choices.index(stated[name])])


def heading(subject: Subject) -> str:
    """Returns MMLU's heading of a subject."""
    return f"The following are multiple choice questions (with answers) about {subject.name}.\n\n"


# Documents. Each kind needs some of the steps of answering a question that has choices.


def repeat_document(rng: random.Random, count: int) -> list[Piece]:
    """Draws random words and says them twice: the second time each can be predicted from the one before it."""
    words = rng.sample(WORDS, count)
    said = "".join(f" {word}" for word in words)
    return [(f"Say:{said}. Again: {words[0]}", FILLER), *((f" {w}", ANSWER) for w in words[1:]), (".", FILLER)]


def recall_document(rng: random.Random, count: int) -> list[Piece]:
    """Draws a note, then asks for all its facts in another order."""
    subject = rng.choice(SUBJECTS)
    facts = draw_facts(rng, subject, count)
    pass_over(rng, 2)
    pieces: list[Piece] = [("Note:" + "".join(f" {n} {subject.states} {v}." for n, v in facts.items()), FILLER)]
    for name in rng.sample(sorted(facts), count):
        pieces += [(f" What does {name} {subject.asks}?", FILLER), (f" {facts[name]}", ANSWER), (".", FILLER)]
    return pieces


def letters_document(rng: random.Random, count: int = 4) -> list[Piece]:
    """Draws lettered choices, then asks for the letter of each."""
    values = rng.sample(rng.choice(SUBJECTS).values, count)
    pass_over(rng, 2)
    lines = "\n".join(f"{letter}. {value}" for letter, value in zip(LETTERS[:count], values, strict=True))
    pieces: list[Piece] = [(lines, FILLER)]
    for value in rng.sample(values, count):
        pieces += [(f"\nWhich is {value}?", FILLER), (f" {LETTERS[values.index(value)]}", ANSWER)]
    return pieces


def which_document(rng: random.Random, choices: int = 4) -> list[Piece]:
    """Draws a question that names the value itself: only its letter has to be found."""
    values = rng.sample(rng.choice(SUBJECTS).values, choices)
    letter = rng.choice(LETTERS[:choices])
    question = Question(f"Which is {values[LETTERS.index(letter)]}?", tuple(values), letter)
    return question.pieces(rng)


def exam_document(rng: random.Random, count: int, facts: int = 4) -> list[Piece]:
    """Draws `count` solved questions of one subject under MMLU's heading."""
    subject = rng.choice(SUBJECTS)
    pass_over(rng, 1)
    pieces: list[Piece] = [(heading(subject), FILLER)]
    for index in range(count):
        pieces += [("\n\n", FILLER)] if index else []
        pieces += draw_question(rng, subject, facts).pieces(rng)
    return pieces


def english_documents(text: str, longest: int = 1500) -> list[str]:
    """Joins the copy's paragraphs into documents of up to `longest` characters."""
    documents = [""]
    for paragraph in text.split("\n\n"):
        if documents[-1] and len(documents[-1]) + len(paragraph) > longest:
            documents.append("")
        documents[-1] += ("\n\n" if documents[-1] else "") + paragraph
    return [document for document in documents if document.strip()]


def split_english(text: str) -> tuple[list[str], list[str]]:
    """Returns (train, held out): every twentieth document is held out."""
    documents = english_documents(text)
    return [document for index, document in enumerate(documents) if index % 20], documents[::20]


def generated_document(rng: random.Random) -> str:
    """Draws one document of the mixture in the committed text."""
    kind = rng.choices(("recall", "repeat", "letters", "which", "exam"), (20, 8, 15, 12, 45))[0]
    if kind == "recall":
        pieces = recall_document(rng, rng.randint(2, 6))
    elif kind == "repeat":
        pieces = repeat_document(rng, rng.randint(6, 20))
    elif kind == "letters":
        pieces = letters_document(rng)
    elif kind == "which":
        pieces = which_document(rng)
    else:
        pieces = exam_document(rng, rng.randint(1, 5))
    return "".join(text for text, _ in pieces)


# Files


def make_text(english: str, seed: int, characters: int = 1_250_000) -> dict[str, str]:
    """Returns contents by file: `characters` of generated documents shuffled among the English, 5% held out."""
    rng = random.Random(seed)
    files = {}
    for name, documents, share in zip(("train", "heldout"), split_english(english), (0.95, 0.05), strict=True):
        written = 0
        while written < characters * share:
            documents.append(generated_document(rng))
            written += len(documents[-1])
        rng.shuffle(documents)
        rows = (json.dumps({"text": document}, ensure_ascii=False) for document in documents)
        files[f"text/{name}.jsonl"] = "".join(f"{row}\n" for row in rows)
    return files


def make_mmlu(seed: int, test_rows: int = 100) -> dict[str, str]:
    """Returns contents by file, in the layout of the published MMLU files."""
    rng = random.Random(seed + 1)
    files = {}
    for subject in SUBJECTS:
        splits = {
            "dev": [draw_question(rng, subject) for _ in range(5)],
            "test": [draw_question(rng, subject, reserved=True) for _ in range(test_rows)],
        }
        for split, questions in splits.items():
            table = io.StringIO()
            csv.writer(table, lineterminator="\n").writerows([q.text, *q.choices, q.answer] for q in questions)
            files[f"mmlu/{split}/{subject.name}_{split}.csv"] = table.getvalue()
    return files


def write_files(folder: Path, files: dict[str, str]) -> None:
    """Writes files into a folder, with Unix line ends."""
    for name, contents in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(contents, encoding="utf-8", newline="\n")
