"""`make gpu-check` as a whole, in this process: the report, the time that parts have, and the exit code. What its
checks find: test_gpu_check_*.py.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from preflight.checks.basics import FAILURE, OK, WARNING
from preflight.gpu_check import __main__ as command
from preflight.gpu_check import first
from preflight.gpu_check.children import FOUND, Child, last_lines
from preflight.gpu_check.report import NOTHING_RAN, Report
from preflight.gpu_check.results import LEFT_OUT, NOT_APPLICABLE, Result
from tests.preflight.gpu_checks import facts, session

ROOT = Path(__file__).parents[2]


def run(tmp_path, monkeypatch, parts, n_gpus=1):
    """Runs the command with these results, or generators, by part. Returns the exit code and the report."""
    monkeypatch.setattr(command, "learn_facts", lambda work: (facts(n_gpus), ""))
    for part in command.PARTS:
        monkeypatch.setitem(command.PARTS, part, lambda _, part=part: parts[part])
    argv = ["--parts", *parts, "--output", str(tmp_path / "report.md"), "--work", str(tmp_path / "work")]
    return command.main(argv), (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "status,code", [(OK, 0), (WARNING, 0), (NOT_APPLICABLE, 0), (LEFT_OUT, 1), (FAILURE, 1)], ids=str
)
def test_only_what_passed_exits_with_zero(tmp_path, monkeypatch, status, code):
    results = [Result(OK, "one", "is well"), Result(status, "other", "so")]
    assert run(tmp_path, monkeypatch, {"first": results})[0] == code


def test_a_failure_names_the_next_thing_and_shows_the_end_of_its_log(tmp_path, monkeypatch, capsys):
    failure = Result(FAILURE, "compiled", "exit code 1", "look at the graphs", ["torchrun train_gpus.py", "Error: no"])
    code, report = run(tmp_path, monkeypatch, {"train": [failure]})
    assert code == 1
    assert "- **failure** compiled: exit code 1\n  - next: look at the graphs\n" in report
    assert "```text\n  torchrun train_gpus.py\n  Error: no\n  ```" in report
    shown = capsys.readouterr().out
    assert "failure  compiled: exit code 1\n         -> look at the graphs\n" in shown and "| Error: no\n" in shown


def test_the_report_ends_with_what_the_results_page_takes(tmp_path, monkeypatch):
    figures = Result(OK, "step", "9000 tokens/s", figures=["| case | MFU |", "| --- | --- |", "| batch 2 | 0.5 |"])
    _, report = run(tmp_path, monkeypatch, {"first": [Result(WARNING, "a", "b", "c")], "bench": [figures]})
    block = report.partition("## For benchmarks/RESULTS.md\n")[2]
    assert "### `make gpu-check`, 2026-12-01" in block
    machine = "NVIDIA H200, driver 580.159, CUDA 13.0, torch 2.11.0+cu130, Triton 3.6.0, Python 3.12.3"
    assert f"{machine}. Scan by plain PyTorch, convolution by plain PyTorch, commit abc1234." in block
    assert "| first | 0 | 1 | 0 | 0 | 0 |" in block and "| bench | 1 | 0 | 0 | 0 | 0 |" in block
    assert block.endswith("step: 9000 tokens/s.\n\n| case | MFU |\n| --- | --- |\n| batch 2 | 0.5 |\n")
    assert NOTHING_RAN not in report


def test_without_a_gpu_the_report_says_that_nothing_ran_on_one(tmp_path, monkeypatch, capsys):
    figures = Result(OK, "step", "9 tokens/s", figures=["| case |"])
    code, report = run(tmp_path, monkeypatch, {"bench": [figures]}, n_gpus=0)
    assert code == 0 and report.count(NOTHING_RAN) == 2 and "| case |" not in report
    assert NOTHING_RAN.replace("*", "") in capsys.readouterr().out


def test_parts_that_are_run_one_by_one_make_one_report(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, {"train": [Result(FAILURE, "compiled", "broken", "mend it")]})
    run(tmp_path, monkeypatch, {"first": [Result(OK, "versions", "new")]})
    code, report = run(tmp_path, monkeypatch, {"train": [Result(OK, "compiled", "well")]})
    assert code == 0 and report.index("## first") < report.index("## train")
    assert "versions: new" in report and "compiled: well" in report and "broken" not in report


def test_what_was_found_is_written_before_the_next_check_begins(tmp_path, monkeypatch):
    def results():
        yield Result(OK, "versions", "well")
        assert "versions: well" in (tmp_path / "report.md").read_text()
        kept = json.loads((tmp_path / "work" / "findings.json").read_text())
        assert kept["first"]["results"][0]["found"] == "well"
        raise KeyboardInterrupt

    code, report = run(tmp_path, monkeypatch, {"first": results(), "train": [Result(OK, "never", "begun")]})
    assert code == 130 and "versions: well" in report and "never" not in report
    assert "running: if nothing is, it was ended from outside" in report


def test_a_mistake_in_a_check_does_not_end_the_others(tmp_path, monkeypatch):
    def results():
        yield Result(OK, "versions", "well")
        raise KeyError("no such row")

    code, report = run(tmp_path, monkeypatch, {"first": results(), "train": [Result(OK, "next", "ran")]})
    assert code == 1 and "**failure** first: KeyError: 'no such row'" in report and "next: ran" in report
    assert 'raise KeyError("no such row")' in report


@pytest.mark.parametrize("kept", ["", "{", '{"first": {"of": "an older version"}}'])
def test_findings_that_cannot_be_read_are_begun_anew(tmp_path, monkeypatch, kept):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "findings.json").write_text(kept)
    code, report = run(tmp_path, monkeypatch, {"train": [Result(OK, "next", "ran")]})
    assert code == 0 and "next: ran" in report and "## first" not in report


def test_an_output_that_cannot_be_written_is_the_first_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "learn_facts", lambda work: pytest.fail("was started"))
    assert command.main(["--output", str(tmp_path / "none" / "report.md")]) == 2
    assert f"--output {tmp_path}/none/report.md: cannot be written" in capsys.readouterr().err


def test_a_machine_without_packages_is_sent_to_the_doctor(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "learn_facts", lambda work: (None, "exit code 1\nNo module named 'torch'"))
    argv = ["--output", str(tmp_path / "report.md"), "--work", str(tmp_path)]
    assert command.main(argv) == 1
    assert "No module named 'torch'\n         -> python doctor.py" in capsys.readouterr().out


# --- time ----------------------------------------------------------------------------------------------------


def test_all_parts_end_within_ten_minutes_and_one_alone_within_nine():
    ends = command.part_ends(["first", "train", "bench"], begun=100.0, minutes=None)
    assert list(ends) == ["first", "train", "bench"]
    assert 100 < ends["first"] < ends["train"] < ends["bench"] < 100 + 600 - 15
    for part in ends:
        assert 400 < command.part_ends([part], 100.0, None)[part] - 100 < 540 - 15
    assert command.part_ends(["train"], 0.0, minutes=30) == {"train": 1800}


def test_nothing_is_started_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(first, "Child", lambda *_: pytest.fail("was started"))
    found = [
        *first.run_check(session(tmp_path, seconds=1), "mixer", ["x"]),
        *first.doctor(session(tmp_path, seconds=1)),
    ]
    assert [(one.status, one.name) for one in found] == [(LEFT_OUT, "mixer"), (LEFT_OUT, "doctor")]
    assert "PARTS=first" in found[0].remedy


# --- processes -----------------------------------------------------------------------------------------------


def test_a_check_that_dies_keeps_what_it_found(tmp_path):
    said = FOUND + json.dumps({"status": OK, "name": "half", "found": "done", "remedy": ""})
    program = f"import os, signal\nprint({said!r}, flush=True)\nprint('last words', flush=True)\n"
    command = [sys.executable, "-c", program + "os.kill(os.getpid(), signal.SIGABRT)"]
    half, end = first.run_check(session(tmp_path), "mixer", command)
    assert (half.status, half.name, half.found) == (OK, "half", "done")
    assert (end.status, end.name, end.found) == (FAILURE, "mixer", "killed by SIGABRT")
    assert end.lines[-1] == "last words" and end.remedy.startswith("CUDA_LAUNCH_BLOCKING=1 python -c")


def test_a_process_is_ended_with_what_it_started(tmp_path):
    program = "import subprocess, sys\n"
    program += "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
    program += "print(p.pid, flush=True); p.wait()"
    child = Child([sys.executable, "-c", program], tmp_path / "a.log")
    assert child.wait_until(lambda: bool(last_lines(child.log)), 60)
    (grandchild,) = map(int, last_lines(child.log))
    assert set(child.pids()) == {child.process.pid, grandchild}
    assert child.wait(0.0).startswith("stopped after")
    deadline = time.monotonic() + 60
    while Path(f"/proc/{grandchild}").exists() and "\nState:\tZ" not in Path(f"/proc/{grandchild}/status").read_text():
        assert time.monotonic() < deadline


def test_only_the_end_of_a_log_is_shown(tmp_path):
    (tmp_path / "a.log").write_text("\n\n".join(f"line {n} " + "x" * 300 for n in range(40)))
    lines = last_lines(tmp_path / "a.log")
    assert len(lines) == 15 and lines[-1].startswith("line 39") and len(lines[-1]) == 200
    assert last_lines(tmp_path / "none.log") == []


# --- the environment -----------------------------------------------------------------------------------------


def test_a_cpu_has_no_environment_of_gpus(tmp_path):
    found = list(first.environment(session(tmp_path)))
    assert [one.status for one in found] == [OK, OK, NOT_APPLICABLE]
    assert found[2].found == "not applicable: no GPU" and "NCCL_DEBUG=INFO" in found[1].found


def test_the_environment_of_gpus(tmp_path):
    one = {result.name: result for result in first.environment(session(tmp_path, 1, compiler="none"))}
    assert "NVIDIA H200, 143.8 GB; compute capability 9.0, driver 580.159" in one["GPUs"].found
    assert one["Triton's compiler"].status == WARNING and "gcc" in one["Triton's compiler"].remedy
    assert one["peer copies"].status == NOT_APPLICABLE
    settings = {"NCCL_P2P_DISABLE": "1"}
    two = {result.name: result for result in first.environment(session(tmp_path, 2, settings=settings))}
    assert two["peer copies"].found == "0 of 2 pairs of GPUs are direct, off by NCCL_P2P_DISABLE=1"
    assert two["Triton's compiler"].status == OK


@pytest.mark.parametrize("parts,expected", [((), "first train bench"), (("PARTS=train,bench",), "train bench")])
def test_make_hands_the_parts_over(parts, expected):
    done = subprocess.run(["make", "-n", "gpu-check", *parts], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"-m preflight.gpu_check --parts {expected} \\\n" in done.stdout


def test_sections_of_an_earlier_report_have_their_own_machine(tmp_path):
    report = Report(tmp_path / "report.md", tmp_path, ["first", "train"])
    report.begin("first", facts(1, driver="500"))
    again = Report(tmp_path / "report.md", tmp_path, ["first", "train"])
    again.begin("train", facts(1))
    text = (tmp_path / "report.md").read_text()
    assert "driver 500" in text and "driver 580.159" in text
