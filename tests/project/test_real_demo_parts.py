"""The parts of `make demo-real` that need no real model: its text, and its report. test_demo_real.py runs it."""

import subprocess
from pathlib import Path

from presets import real_text
from presets.real_report import write_page
from presets.real_text import LENGTH, SHAKESPEARE, Document, speeches, split

ROOT = Path(__file__).parents[2]


def documents(source: str, n: int, shared: str = "") -> list[Document]:
    """Returns documents of three paragraphs each, the first of which is `shared` if it is given."""
    names = [f"{source} {i}" for i in range(n)]
    return [
        Document(source, name, "\n\n".join([shared or f"{name} begins", f"{name} " * 150, f"{name} ends"]))
        for name in names
    ]


def test_nothing_of_a_held_out_document_is_trained_on():
    training, held_out = split([documents("a", 200, shared="the same everywhere"), documents("b", 200)])
    assert {document.source for document in held_out} == {"a", "b"}
    assert 20 <= len(held_out) <= 60 and len(training) + len(held_out) == 400
    paragraphs = [set(document.text.split("\n\n")) for document in held_out]
    for document in training:
        assert not document.is_held_out
        assert all(part not in found for found in paragraphs for part in document.text.split("\n\n"))
    assert sum("the same everywhere" in document.text for document in [*training, *held_out]) == 1
    assert split([documents("a", 300, shared="the same everywhere"), documents("b", 200)])[1][:20] == held_out[:20]


def test_a_held_out_document_is_its_beginning_and_the_sources_come_in_turn():
    long = [Document("a", f"a {i}", "\n\n".join(f"{i} {k} " * 100 for k in range(40))) for i in range(100)]
    _, held_out = split([long, documents("b", 100)])
    lengths = [len(document.text) for document in held_out if document.source == "a"]
    assert all(LENGTH <= length <= LENGTH + 1000 for length in lengths)
    assert [document.source for document in held_out[:4]] == ["a", "b", "a", "b"]


def test_the_plays_are_cut_between_speeches():
    found = list(speeches())
    assert len(found) > 90 and all(document.text in SHAKESPEARE.read_text() for document in found)
    assert found[0].text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.")


HELD_OUT = {"ce": 3.0, "kl": 0.5, "agreement": 0.6, "perplexity": 20.0, "tokens": 512}
RETRIEVAL = [{"length": 256, "pairs": 4, "acc": 0.5, "n": 8, "chance": 0.25}]
MODEL = {"held_out": HELD_OUT, "retrieval": RETRIEVAL, "copying": {"words": 120, "acc": 0.3, "n": 400}}
REPORT = {
    "start": {
        which: {"zero": {"kl": 4.0}, "projections": {"kl": 6.0}, "closed_form": {"kl": 1.0}}
        for which in ("all", "every second", "chosen")
    },
    "stages": {
        "align": [
            {"step": 1, "tokens": 512, "alignment": {"layers": [2, 4], "errors": [0.7, 0.5]}},
            {
                "step": 2,
                "tokens": 1024,
                "alignment": {"layers": [2, 4], "errors": [0.5, 0.3]},
                "eval": {"kl": 0.9, "agreement": 0.5, "ce": 3.5},
            },
        ],
        "distil": [{"step": 2, "tokens": 2048, "eval": {"kl": 0.4, "agreement": 0.7, "ce": 3.2}}],
    },
    "models": {
        "hybrid": MODEL,
        "hybrid_ft": MODEL,
        "teacher": {**MODEL, "held_out": {**HELD_OUT, "kl": 0.0, "perplexity": 16.0}},
    },
    "answers": [{"prompt": "Why|is\nit?", "teacher": "So.", "hybrid": "It is."}],
}


def test_the_page_has_the_figures_of_every_step():
    lines = write_page(REPORT).splitlines()
    assert "| closed form | 1.00 (0.25) | 1.00 (0.25) | 1.00 (0.25) |" in lines
    assert "| align | 1,024 | 0.9000 | 0.5000 | 3.5000 | 0.4000 |" in lines
    assert "| distil | 3,072 | 0.4000 | 0.7000 | 3.2000 | - |" in lines  # over the tokens of both
    assert "| perplexity, of the teacher's | 1.2500 | 1.2500 | 1.0000 |" in lines
    assert "| copying | 0.3000 | 0.3000 | 0.3000 |" in lines
    assert lines[0].startswith("# ") and any(line.startswith("| Why\\|is") for line in lines)


def test_make_skips_what_is_done(tmp_path):
    for name in ("teacher/config.json", "text/train.jsonl", "students/closed_form/conversion.json", "aligned"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    variables = [f"REAL={tmp_path}", f"REAL_TEACHER={tmp_path / 'teacher'}", "BIN=.venv/bin"]
    make = ["make", "--dry-run", "--old-file=.venv/installed", "--old-file=.venv/installed-gguf"]
    found = subprocess.run(
        [*make, *variables, "demo-real"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    commands = [line.split()[1:3] for line in found.splitlines() if line.startswith(".venv/bin/python")]
    assert [part for _, part in commands if part.startswith("presets.")] == [
        "presets.real_start",
        "presets.real_report",
    ]
    assert [part for part, _ in commands if part != "-m"] == [
        "make_student.py",  # the one for comparison
        "train_gpus.py",
        "eval_mmlu_hybrid.py",
        "report.py",
    ]


def test_a_text_whose_making_was_killed_is_made_again(tmp_path, monkeypatch):
    """make looks for train.jsonl alone."""
    written = []
    document = Document("documentation", "name", "text")
    monkeypatch.setattr(real_text, "split", lambda _: ([document], [document]))
    monkeypatch.setattr(real_text, "chapters", list)
    monkeypatch.setattr(real_text, "docstrings", list)
    monkeypatch.setattr(real_text, "write_whole", lambda path, _: written.append(path.name))
    monkeypatch.setattr("sys.argv", ["real_text", str(tmp_path)])
    real_text.main()
    assert written == ["heldout.jsonl", "train.jsonl"]
