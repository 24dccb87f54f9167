"""doctor.py as a whole, on the tiny preset, and how checks are run. What each check finds: test_check_*.py."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

import doctor
from preflight.checks.basics import FAILURE, OK, WARNING, CheckSkipped, Finding, run_check
from tests.preflight.cases import found, statuses

ROOT = Path(__file__).parents[2]


def test_the_tiny_preset_passes(tmp_path, capsys):
    options = ["--preset", "tiny", "--output_dir", str(tmp_path / "new" / "run"), "--eval_interval", "5"]
    code = doctor.main([*options, "--collectives", "--json", str(tmp_path / "findings.json")])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0, lines
    findings = [Finding(**row) for row in json.loads((tmp_path / "findings.json").read_text())]
    assert not [finding for finding in findings if finding.status == FAILURE]
    for finding in findings:
        assert f"{finding.status:<8} {finding.name}: {finding.found}" in lines
    names = " ".join(finding.name for finding in findings)
    for part in ("Python", "torch", "GPUs", "tokenizer", "--dataset_name", "whole models", "kernels", "collectives"):
        assert part in names
    assert "--eval_dataset_name" in names
    n_ok = statuses(findings).count(OK)
    assert lines[-1] == f"{n_ok} ok, {len(findings) - n_ok} warning(s), 0 failure(s)"
    assert list(tmp_path.iterdir()) == [tmp_path / "findings.json"], "nothing else is left"


def test_without_a_teacher_the_others_still_run(capsys, tmp_path):
    assert doctor.main(["--preset", "tiny", "--teacher_model", "./nowhere", "--output_dir", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    missing = next(i for i, line in enumerate(lines) if line.startswith("failure"))
    assert "--teacher_model ./nowhere: neither a directory" in lines[missing]
    assert lines[missing + 1].startswith(" " * 8 + " -> give a directory")
    assert "warning  tokenizer: skipped: the teacher is not on this disk, see above" in lines
    for name in ("--student_model", "--dataset_name", "student equal to its teacher (loss alone)", "links"):
        assert any(line.startswith(f"ok       {name}") for line in lines), name
    assert lines[-1].endswith(" 1 failure(s)")


def test_a_wrong_option_is_the_error_of_training(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "first_findings", lambda: iter(()))
    assert doctor.main(["--preset", "tiny", "--batch_size", "0"]) == 2
    assert "--batch_size 0: expected at least 1" in capsys.readouterr().err
    assert doctor.main(["--preset", "tiny", "--nproc_per_node", "0"]) == 2
    assert "--nproc_per_node 0: expected at least 1, at most 1_000" in capsys.readouterr().err


def test_a_python_without_packages_is_a_finding():
    command = [sys.executable, "-S", "doctor.py", "--preset", "tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == ""
    assert "cannot be imported: yaml (no module yaml)" in done.stdout and "Nothing else can be checked" in done.stdout


def test_a_file_of_findings_that_cannot_be_written_is_the_first_error(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "first_findings", lambda: pytest.fail("was checked"))
    assert doctor.main(["--preset", "tiny", "--json", str(tmp_path / "none" / "d.json")]) == 2
    error = f"error: --json {tmp_path}/none/d.json: cannot be written (No such file or directory); name another file"
    assert capsys.readouterr().err == error + "\n"


@pytest.mark.parametrize("missing", ["yaml", "torch"])
def test_nothing_else_is_checked_without_the_packages(missing, capsys, monkeypatch):
    def check_imports(names=("torch",)):
        if missing in names:
            yield Finding(FAILURE, "imports", f"cannot be imported: {missing}", "make setup")

    monkeypatch.setattr(doctor, "check_imports", check_imports)
    monkeypatch.setattr(doctor, "all_findings", lambda _: pytest.fail("was checked"))
    assert doctor.main(["--preset", "tiny"]) == 1
    assert "-> make setup\n\nNothing else can be checked" in capsys.readouterr().out


def test_help_loads_no_package():
    """In a process of its own: torch takes seconds to import, and a new machine may not have it."""
    program = "import json, sys, doctor\ntry: doctor.main(['--help'])\nfinally: print(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    *_, modules = done.stdout.splitlines()
    assert done.returncode == 0 and "--nproc_per_node" in done.stdout
    assert not {"torch", "transformers", "datasets", "numpy", "yaml"} & set(json.loads(modules))


def test_no_check_ends_the_others():
    def broken(_):
        yield Finding(OK, "first", "well")
        raise KeyError("no\nsuch key")

    first, last = found(broken)
    assert first.found == "well"
    assert last.status == FAILURE and last.found == "KeyError: 'no\\nsuch key'" and __file__ in last.remedy


def test_findings_are_shown_as_they_come():
    def slow(_):
        yield Finding(OK, "first", "begins")
        pytest.fail("ran on before the first was shown")

    assert next(run_check("name", slow, None)).found == "begins"


def test_a_value_error_brings_its_remedy():
    def wrong(_):
        raise ValueError("--flag x: expected y; and\nz; do this")
        yield

    assert found(wrong) == [Finding(FAILURE, "name", "--flag x: expected y; and z", "do this")]


def test_what_a_check_cannot_see_and_what_it_logs_are_warnings():
    def blind(_):
        logging.getLogger("train").warning("%d files are not read; name them", 3)
        raise CheckSkipped("there is no teacher")
        yield

    handlers = logging.getLogger("train").handlers[:]
    first, second = found(blind)
    assert first == Finding(WARNING, "name", "skipped: there is no teacher, see above")
    assert second == Finding(WARNING, "name", "3 files are not read", "name them")
    assert logging.getLogger("train").handlers == handlers
