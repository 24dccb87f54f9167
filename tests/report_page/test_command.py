"""`python report.py`: where the page is written, errors, and what is imported for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import report
from processes.exits import run_entry
from tests.report_page.run_folders import build, row_of

ROOT = Path(__file__).parents[2]


def run_report(monkeypatch, *argv) -> int:
    monkeypatch.setattr("sys.argv", ["report.py", *map(str, argv)])
    return run_entry(report.main)


def test_the_command_prints_where_the_page_is(tmp_path, monkeypatch, capsys):
    for name in "ab":
        build(tmp_path / name, [row_of(1, **dict.fromkeys(("ce", "kl", "lr", "grad_norm", "tokens_per_s")))])
    assert run_report(monkeypatch, tmp_path / "a", tmp_path / "b") == 0
    page = tmp_path / "a" / "report" / "comparison" / "index.html"
    assert capsys.readouterr().out == f"{page}\n" and page.is_file()


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda folder: None, "no such directory; expected the --output_dir of a run of train_gpus.py"),
        (lambda folder: folder.mkdir(), "no metrics.jsonl in it; expected the --output_dir of a run of train_gpus.py"),
        (lambda folder: build(folder, []), "metrics.jsonl has no row yet; come back after the first optimizer step"),
        (
            lambda folder: build(folder, [], '{"st'),
            "metrics.jsonl has no row yet; come back after the first optimizer step",
        ),
        (
            lambda folder: build(folder, [], "x\n[]\n"),
            "metrics.jsonl has no row yet (2 lines cannot be read); come back after the first optimizer step",
        ),
    ],
)
def test_what_is_not_a_run_directory_is_one_line(tmp_path, monkeypatch, capsys, make, message):
    make(tmp_path / "run")
    assert run_report(monkeypatch, tmp_path / "run") == 2
    assert capsys.readouterr().err == f"error: RUN_DIR {tmp_path / 'run'}: {message}\n"


def test_a_folder_of_runs_names_them(tmp_path, monkeypatch, capsys):
    runs = [build(tmp_path / name, [row_of(1)]) for name in "ab"]
    assert run_report(monkeypatch, tmp_path) == 2
    assert f"; there is one in {runs[0]}, {runs[1]}\n" in capsys.readouterr().err


def test_metrics_that_may_not_be_read_are_one_line(tmp_path, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    run = build(tmp_path / "run", [row_of(1)])
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert run_report(monkeypatch, run) == 2
    assert capsys.readouterr().err == f"error: RUN_DIR {run}: metrics.jsonl cannot be read (Permission denied)\n"


def test_an_output_that_is_no_page_is_not_overwritten(tmp_path, monkeypatch, capsys):
    run = build(tmp_path / "run", [row_of(1)])
    before = (run / "metrics.jsonl").read_bytes()
    assert run_report(monkeypatch, run, "--output", run / "metrics.jsonl") == 2
    assert "expected an HTML file; name one that ends in .html" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    run = build(tmp_path / "run", [{"step": 1}])
    (run / "folder.html").mkdir()
    for output in (run / "status.json" / "x.html", run / "folder.html"):
        assert run_report(monkeypatch, run, "--output", output) == 2
        assert f"--output {output}: cannot be written" in capsys.readouterr().err


def test_a_page_is_drawn_without_torch(tmp_path):
    """In a process of its own: torch and transformers take seconds to import."""
    program = "import json, sys, report; report.main(); print(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", program, str(build(tmp_path / "run", [row_of(1)]))]
    page, modules = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert Path(page).is_file()
    assert not {"torch", "transformers", "datasets", "llamba"} & set(json.loads(modules))
