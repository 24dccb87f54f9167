"""Tables, the report in Markdown and the chart that an evaluation's results become."""

import json
import struct

import pytest

import evaluation.report
from evaluation.pieces import assemble
from evaluation.report import (
    aligned,
    arrange,
    as_markdown,
    compare_all,
    difference_table,
    draw_chart,
    escaped,
    markdown,
    output_files,
    report_results,
    sections,
)

SUBJECTS = ("astronomy", "virology")
CONFIG = {
    "which": "x",
    "teacher_model": "org/teacher",
    "student_model": None,
    "ckpt": None,
    "layers": [1, 3],
    "max_length": 512,
    "dtype": "float32",
    "versions": {"python": "3.11", "torch": "2.13"},
    "mmlu_dir": "cais/mmlu",
    "num_fewshot": 5,
    "limit": None,
    "prompt": "lm-eval's",
    "held_out": "text.txt",
    "held_out_windows": 2,
    "retrieval_questions": 8,
    "seed": 0,
    "tasks": ["gsm8k"],
    "questions_sha256": "ab" * 32,
}


def made_of(letters: dict[str, str], **more) -> dict:
    """Returns the results of a model that gave these letters; all right answers are A."""
    pieces = {
        f"mmlu-{subject}": {
            "predictions": [
                {"subject": subject, "index": i, "answer": "A", "prediction": letter, "log_likelihoods": [-1.0] * 4}
                for i, letter in enumerate(letters[subject])
            ],
            "tokens": {"run": 10, "plain": 40},
        }
        for subject in SUBJECTS
    }
    return assemble(pieces | more.pop("pieces", {}), {**CONFIG, **more})


EXTRA = {
    "held_out-0": [30.0, 5.0, 6.0, 10.0],
    "held_out-8": [10.0, 5.0, 4.0, 10.0],
    "retrieval-128x4": {"length": 128, "pairs": 4, "acc": 0.5, "n": 8, "chance": 0.25},
    "retrieval-128x64": {"length": 128, "pairs": 64, "acc": None, "n": 0, "chance": 1 / 64},
    "copying-words": {"words": 120, "acc": 0.25, "n": 400},
    "task-gsm8k": {
        "results": {"gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": None}},
        "n_shot": {"gsm8k": 5},
        "n_samples": {"gsm8k": {"original": 8, "effective": 8}},
        "versions": {"gsm8k": 3},
    },
}


@pytest.fixture
def results() -> dict[str, dict]:
    return {
        "student": made_of(
            {"astronomy": "AABB", "virology": "AB"}, pieces=EXTRA, student_model="org/student", layers=[]
        ),
        "teacher": made_of({"astronomy": "AAAB", "virology": "AA"}, pieces=EXTRA, layers=None),
    }


def test_pieces_are_put_together(results):
    student = results["student"]
    assert (student["acc"], student["n"], student["tokens"]) == (0.5, 6, {"run": 20, "plain": 80})
    assert student["held_out"] == {
        "ce": 2.0,
        "kl": 0.5,
        "agreement": 0.5,
        "perplexity": pytest.approx(7.389056),
        "tokens": 20,
    }
    assert [cell["pairs"] for cell in student["retrieval"]] == [4, 64]
    assert list(student["tasks"]) == ["gsm8k"]
    assert list(student)[-2:] == ["config", "predictions"]


def test_the_screen_shows_scores_and_differences(results):
    found = sections(results, compare_all(results), ("groups",))
    _, scores, differences, held_out, retrieval, copying, tasks = (section.table for section in found)
    assert scores[0] == ["subject", "n", "student", "teacher"]
    assert [row[0] for row in scores[1:]] == ["astronomy", "virology", "stem", "other", "all", "stderr"]
    assert scores[-2] == ["all", "6", "0.5000", "0.8333"]
    assert [row[:4] for row in differences[1:]] == [
        ["teacher - student", "all", "6", "+0.3333"],
        ["teacher - student", "stem", "4", "+0.2500"],
        ["teacher - student", "other", "2", "+0.5000"],
    ]
    assert differences[1][-2:] == ["2", "0"]  # gained, lost
    assert held_out[1] == ["student", "2.0000", "0.5000", "0.5000", "7.3891", "20"]
    assert [row[-1] for row in retrieval] == ["teacher", "0.5000", "-"]
    assert copying == [["copying: words", "n", "student", "teacher"], ["120", "400", "0.2500", "0.2500"]]
    assert tasks[1] == ["gsm8k", "5", "8", "exact_match,strict-match", "0.2500", "0.2500"]
    lines = aligned(scores).splitlines()
    assert lines[0].startswith("subject") and len({len(line) for line in lines}) == 1


def test_every_two_models_are_compared(results):
    results["hybrid"] = made_of({"astronomy": "BBBB", "virology": "BB"})
    pairs = [(difference["of"], difference["to"]) for difference in compare_all(results)]
    assert pairs == [("teacher", "student"), ("hybrid", "student"), ("hybrid", "teacher")]
    assert [difference["diff"] for difference in compare_all(results)] == pytest.approx([1 / 3, -1 / 2, -5 / 6])


def test_the_report_says_what_was_measured_and_how(results):
    text = markdown(sections(results, compare_all(results), ("groups", "subjects")))
    for part in (
        "## MMLU, 5-shot, 2 subjects",
        "held_out text.txt, held_out_windows 2",
        "retrieval_questions 8, seed 0",
        "limit None, tasks ['gsm8k']",
        "Prompt: lm-eval's. Data: cais/mmlu, SHA-256 of the questions abababababababab",
        "| student | org/student | none | float32 | 512 | python 3.11, torch 2.13 |",
        "| teacher | org/teacher | all | float32 | 512 | python 3.11, torch 2.13 |",
        "| teacher - student | virology | 2 | +0.5000 |",
        "## Held-out text",
        "## Retrieval",
        "## Tasks",
    ):
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
    assert as_markdown([["a|b", "c"], ["1", "2"]]) == "| a\\|b | c |\n| --- | --- |\n| 1 | 2 |"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("high_school_biology, p [1]", "high_school_biology, p [1]"),
        ("a|b`c*d~e\\$f$", "a\\|b\\`c\\*d\\~e\\\\\\$f\\$"),
        ("<img src=x> & co", "&lt;img src=x&gt; &amp; co"),
        ("[x](http://x) ![x][y]", "[x\\](http://x) ![x\\][y]"),
        ("_x_ __init__", "\\_x\\_ \\_\\_init\\_\\_"),
        ("a\n# b\r\t\x1b[2J\ud800", "a\\\\n# b\\\\r\\\\t\\\\x1b[2J\\\\ud800"),
        ("混合\u3000模型", "混合\u3000模型"),
    ],
)
def test_names_from_outside_are_shown_as_they_are(text, shown):
    assert escaped(text) == shown


@pytest.mark.parametrize("subject", ["a|b\n\x1b[2J", "$\\frac{$", "\ud800", "../../../etc/passwd", "x" * 5000])
def test_a_subject_may_have_any_name(subject, tmp_path, capsys):
    pieces = {
        f"mmlu-{subject}": {
            "predictions": [
                {"subject": subject, "index": 0, "answer": "A", "prediction": "A", "log_likelihoods": [-1.0] * 4}
            ],
            "tokens": {"run": 1, "plain": 1},
            "cut": 1,
        }
    }
    report_results({name: assemble(pieces, CONFIG) for name in ("student", "teacher")}, tmp_path / "eval.json")
    report = (tmp_path / "eval.md").read_text()
    assert f"| {escaped(subject)} | 1 | 1.0000 | 1.0000 |" in report
    assert "1 prompts are longer than 512 tokens and lose their start." in report
    assert subject in json.loads((tmp_path / "eval.json").read_text())["models"]["student"]["subjects"]
    assert not {"\x1b", "\ud800"} & set(capsys.readouterr().out)


def test_many_subjects_without_groups_do_not_fill_a_picture(results):
    for result in results.values():
        result["groups"] = {}
        result["subjects"] = {f"s{i}": result["subjects"]["virology"] for i in range(2000)}
    assert draw_chart(results).startswith(b"\x89PNG")


def test_the_chart_is_a_picture_of_a_size_to_be_looked_at(results):
    data = draw_chart(results)
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG") and width > 800 and height > 500


def test_of_several_models_the_json_has_scores_in_front_and_differences_behind(results):
    arranged = arrange(results, compare_all(results))
    assert list(arranged) == ["student", "teacher", "n", "models", "differences"]
    assert (arranged["student"], arranged["n"]) == (0.5, 6)
    assert arrange({"student": results["student"]}, []) == results["student"]


def test_without_mmlu_the_rest_is_reported(tmp_path, capsys):
    alone = {name: assemble(EXTRA, CONFIG) for name in ("student", "teacher")}
    report_results(alone, tmp_path / "out" / "eval.json")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["eval.json", "eval.md"]
    assert list(json.loads((tmp_path / "out" / "eval.json").read_text())) == ["models", "differences"]
    shown = capsys.readouterr().out
    assert "python 3.11, torch 2.13" in shown and "held_out text.txt, held_out_windows 2" in shown
    assert "held-out text" in shown and "subject" not in shown


def test_what_is_no_number_is_none_in_the_json(results, tmp_path):
    results["student"]["held_out"]["perplexity"] = float("inf")
    report_results(results, tmp_path / "eval.json")
    report = json.loads((tmp_path / "eval.json").read_text(), parse_constant=pytest.fail)
    assert report["models"]["student"]["held_out"]["perplexity"] is None


def test_a_screen_that_is_gone_takes_no_file_with_it(results, tmp_path, monkeypatch):
    def gone(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", gone)
    with pytest.raises(BrokenPipeError):
        report_results(results, tmp_path / "eval.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "eval.md", "eval.png"]


def test_a_disk_that_is_full_is_one_error(results, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation.report, "write_whole", full)
    with pytest.raises(ValueError, match="--output .*eval.json: cannot be written .No space left.*--resume"):
        report_results(results, tmp_path / "eval.json")


@pytest.mark.parametrize("name", ["eval.json", "run-0.5", "eval"])
def test_every_output_has_a_report_and_a_chart_of_its_own(tmp_path, name):
    of_json, of_report, of_chart = output_files(tmp_path / name)
    assert of_json == tmp_path / name
    assert (of_report.name, of_chart.name) == (f"{name.removesuffix('.json')}.md", f"{name.removesuffix('.json')}.png")


def test_a_subject_with_a_groups_name_has_its_own_row(results):
    for result in results.values():
        for prediction in result["predictions"]:
            prediction["subject"] = {"astronomy": "astronomy", "virology": "stem"}[prediction["subject"]]
    rows = difference_table(compare_all(results), ("groups", "subjects"))[1:]
    assert [(row[1], row[2]) for row in rows] == [("all", "6"), ("stem", "4"), ("astronomy", "4"), ("stem", "2")]
