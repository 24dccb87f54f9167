"""The part `train` of `make gpu-check`: which runs apply, and what is said of one that fails. Runs that are played take
no time; the whole part with real runs is marked slow.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from preflight.checks.basics import FAILURE, OK, WARNING
from preflight.gpu_check import train
from preflight.gpu_check.children import Child
from preflight.gpu_check.compare import in_words, largest_differences
from preflight.gpu_check.contexts import judge_contexts, local_rank, parse, watch
from preflight.gpu_check.interrupted import interrupt_and_resume
from preflight.gpu_check.results import LEFT_OUT, NO_GPU_HERE, NOT_APPLICABLE
from preflight.gpu_check.runs import STEPS, Run, new_run
from tests.preflight.gpu_checks import session

ROOT = Path(__file__).parents[2]


def rows_of(loss=2.0, norm=1.0, n=STEPS, factor=1.0):
    rows = [{"step": i + 1, "loss": loss * factor, "grad_norm": norm} for i in range(n)]
    return [row | ({"eval": {"loss": 3.0 * factor}} if row["step"] % 8 == 0 else {}) for row in rows]


def played(monkeypatch, rows=None, problem=None):
    """Has runs end at once, with rows by the name of their folder's beginning, or problems likewise."""
    ran = []

    def finish(run, session):
        ran.append(run)
        if session.is_late:
            run.is_left_out = True
            return run
        (run.folder / "latest").mkdir(parents=True)
        (run.folder / "latest" / "model.safetensors").touch()
        run.problem = next((text for name, text in (problem or {}).items() if run.folder.name.startswith(name)), None)
        own = next((own for name, own in (rows or {}).items() if run.folder.name.startswith(name)), rows_of())
        (run.folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in own))
        run.log.write_text("first\nRuntimeError: of this run\n")
        return run

    monkeypatch.setattr(Run, "finish", finish)
    monkeypatch.setattr(train, "interrupt_and_resume", lambda s, options: new_run(s, "again", options).finish(s))
    return ran


def checked(tmp_path, **rest):
    return {result.name: result for result in train.check(session(tmp_path, **rest))}


# --- what applies --------------------------------------------------------------------------------------------


def test_on_a_cpu_what_needs_a_gpu_is_left_out_and_named(tmp_path, monkeypatch):
    ran = played(monkeypatch)
    found = checked(tmp_path)
    needing = [case.name for case in train.CASES if case.n_gpus]
    assert {name: found[name].found for name in needing} == dict.fromkeys(needing, NO_GPU_HERE)
    assert {found[name].status for name in needing} == {NOT_APPLICABLE} and "compiled" in needing
    assert {one.status for name, one in found.items() if name not in needing} == {OK}
    assert not any("cuda" in word for run in ran for word in run.command)
    assert len({run.folder for run in ran}) == len(ran), "each run has a folder of its own"


@pytest.mark.parametrize("n_gpus,absent", [(1, 3), (2, 0)])
def test_gpus_decide_what_applies(tmp_path, monkeypatch, n_gpus, absent):
    ran = played(monkeypatch)
    monkeypatch.setattr(Run, "start", lambda run: run)
    monkeypatch.setattr(train, "watch", lambda run, seconds: (run.finish(session(tmp_path)).problem, {(0, "uuid-0")}))
    found = checked(tmp_path, n_gpus=n_gpus)
    assert sum(one.status == NOT_APPLICABLE for one in found.values()) == absent
    assert not [one for one in found.values() if one.status == FAILURE]
    by_name = {run.folder.name: run for run in ran}
    references = [run for name, run in by_name.items() if name.startswith("cpu-")]
    assert all(run.environment == {"CUDA_VISIBLE_DEVICES": ""} for run in references)
    assert len(references) == (4 if n_gpus == 1 else 5)
    assert "cuda:0" in by_name["bfloat16"].command and not by_name["bfloat16"].environment
    if n_gpus == 2:
        assert "--nproc_per_node=2" in by_name["two-ranks-colocated-teachers"].command
        assert found["CUDA contexts, two ranks, colocated teachers"].status == OK


def test_commands_are_those_of_a_user(tmp_path, monkeypatch):
    """Every run's options can be parsed, and its reference differs from it in nothing that losses depend on."""
    from arguments import parse_train_args

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for case in train.CASES:
        parsed = []
        for options, on_cpu in ((case.all_options, False), (case.reference.options, True)):
            command = new_run(session(tmp_path, n_gpus=2), "a run", options, on_cpu=on_cpu).command
            parsed.append(parse_train_args(command[command.index("train_gpus.py") + 1 :]))
        for name in ("seed", "layers", "dtype", "stage", "seq_length", "batch_size", "max_steps", "max_lr"):
            assert getattr(parsed[0], name) == getattr(parsed[1], name), (case.name, name)


# --- what is said --------------------------------------------------------------------------------------------


def test_a_run_that_fails_shows_its_command_and_the_end_of_its_log(tmp_path, monkeypatch):
    played(monkeypatch, {"logits": rows_of(n=3)}, {"logits": "exit code 1"})
    found = checked(tmp_path)["logits"]
    assert (found.status, found.found) == (FAILURE, f"exit code 1, after 3 of {STEPS} steps")
    assert found.remedy.endswith("distillation/teacher.py: answers that are logits")
    assert "torch.distributed.run --standalone --nproc_per_node=1 train_gpus.py" in found.lines[0]
    assert found.lines[1].endswith("logits.log") and found.lines[-1] == "RuntimeError: of this run"


def test_losses_that_differ_are_a_failure(tmp_path, monkeypatch):
    played(monkeypatch, {"bfloat16": rows_of(factor=1.5)})
    found = checked(tmp_path)
    assert found["bfloat16"].status == FAILURE and found["colocated teacher"].status == OK
    assert "loss by up to 0.5 (step" in found["bfloat16"].found and "is allowed" in found["bfloat16"].found
    assert found["bfloat16"].remedy.startswith("PARTS=first")
    assert any("bfloat16 | failure" in line for line in found["all runs"].figures)


def test_a_run_that_ended_well_but_wrote_too_little_is_a_failure(tmp_path, monkeypatch):
    without_evaluation = [{name: row[name] for name in ("step", "loss", "grad_norm")} for row in rows_of()]
    played(monkeypatch, {"float16": rows_of(n=5), "logits": without_evaluation})
    found = checked(tmp_path)
    assert found["float16"].status == FAILURE and "5 rows" in found["float16"].found
    assert found["logits"].status == FAILURE and "no evaluation" in found["logits"].found
    assert "checkpointing/saver.py" in found["logits"].remedy


def test_what_a_run_warned_of_is_a_warning(tmp_path, monkeypatch):
    played(monkeypatch)
    started = Run.finish

    def warn(run, session):
        started(run, session)
        texts = ("stopped by SIGTERM at step 4", "the loss cannot be compiled", "the loss cannot be compiled")
        n = 3 if "float16" in run.folder.name else 1
        lines = [json.dumps({"time": 1.0, "rank": 0, "text": text}) for text in texts[:n]]
        (run.folder / "warnings.jsonl").write_text("\n".join(lines))
        return run

    monkeypatch.setattr(Run, "finish", warn)
    found = checked(tmp_path)
    assert found["float16"].status == WARNING and "it warned: the loss cannot be compiled" in found["float16"].found
    assert found["float16"].lines == ["the loss cannot be compiled"] and found["logits"].status == OK


def test_a_reference_that_fails_is_named_as_what_failed(tmp_path, monkeypatch):
    played(monkeypatch, problem={"cpu-align": "exit code 2"})
    found = checked(tmp_path)
    assert found["alignment"].status == FAILURE and found["logits"].status == OK
    assert "the same run on the CPU failed (exit code 2)" in found["alignment"].found


def test_runs_are_left_out_when_the_time_is_up(tmp_path, monkeypatch):
    played(monkeypatch)
    found = checked(tmp_path, seconds=1)
    assert found["bfloat16"].status == LEFT_OUT and "PARTS=train" in found["bfloat16"].remedy


# --- differences ---------------------------------------------------------------------------------------------


def test_the_largest_difference_of_all_steps_counts():
    rows, truths = rows_of(), rows_of()
    rows[4]["loss"] *= 1.001
    rows[0]["grad_norm"] *= 0.5
    rows[9]["grad_norm"] *= 2
    differences = largest_differences(rows, truths)
    assert differences["loss"] == (pytest.approx(0.001), 5) and differences["first gradient norm"] == (0.5, 1)
    assert differences["held-out loss"][0] == 0
    words, is_well = in_words(differences, "float32")
    assert not is_well and "first gradient norm by up to 0.5 (step 1; 0.01 is allowed)" in words
    rows[0]["grad_norm"] = truths[0]["grad_norm"]
    assert in_words(largest_differences(rows, truths), "float32")[1]


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_is_no_number_differs_without_bound(value):
    rows, truths = rows_of(), rows_of()
    rows[3]["loss"] = value
    assert largest_differences(rows, truths)["loss"] == (math.inf, 4)
    truths[3]["loss"] = None
    rows[3]["loss"] = None  # skipped on both
    assert largest_differences(rows, truths)["loss"][0] == 0


def test_evaluations_of_every_step_are_compared_where_both_have_them():
    often = [row | {"eval": {"loss": 3.3}} for row in rows_of()]
    assert largest_differences(often, rows_of())["held-out loss"][0] == pytest.approx(0.1)


# --- interrupted ---------------------------------------------------------------------------------------------

# Plays train_gpus.py: appends a row for each step, stops at SIGTERM as it does, and resumes.
TRAINER = """
import json, pathlib, signal, sys, time
folder, steps, deaf = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "deaf"
folder.mkdir(exist_ok=True)
metrics, asked = folder / "metrics.jsonl", []
signal.signal(signal.SIGTERM, lambda *_: None if deaf else asked.append(1))
def status(word, n):
    (folder / "status").write_text(json.dumps({"status": word, "text": word, "micro_step": n}))
    (folder / "status").rename(folder / "status.json")
for n in range(len(metrics.read_text().splitlines()) + 1 if metrics.exists() else 1, steps + 1):
    status("running", n)
    with metrics.open("a") as file:
        file.write(json.dumps({"step": n - (sys.argv[3] == "twice" and n > 1)}) + "\\n")
    (folder / f"checkpoint-{n}").mkdir()
    time.sleep(0.02)
    if asked:
        status("stopped", n)
        sys.exit(1)
status("complete", steps)
"""


def interrupted(tmp_path, monkeypatch, steps=STEPS, how=""):
    (tmp_path / "trainer.py").write_text(TRAINER)

    def new_run(session, name, options):
        command = [sys.executable, str(tmp_path / "trainer.py"), str(tmp_path / "run"), str(steps), how]
        return Run(tmp_path / "run", command, {})

    monkeypatch.setattr("preflight.gpu_check.interrupted.new_run", new_run)
    return interrupt_and_resume(session(tmp_path), "")


def test_a_run_is_stopped_killed_and_resumed_to_its_end(tmp_path, monkeypatch):
    run = interrupted(tmp_path, monkeypatch)
    assert run.problem is None and run.status["status"] == "complete"
    assert [row["step"] for row in run.rows] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    "steps,how,problem",
    [
        (3, "", "ended before step 4"),
        (STEPS, "deaf", "after SIGTERM status.json says complete"),
        (STEPS, "twice", "expected each step once"),
    ],
)
def test_what_is_wrong_with_an_interruption_is_said(tmp_path, monkeypatch, steps, how, problem):
    assert problem in interrupted(tmp_path, monkeypatch, steps, how).problem


# --- CUDA contexts -------------------------------------------------------------------------------------------


def test_a_context_on_another_ranks_gpu_is_a_failure():
    own = {0: {"a", "c"}, 1: {"b"}}
    assert judge_contexts("two ranks", {(0, "a"), (0, "c"), (1, "b")}, own).status == OK
    stray = judge_contexts("two ranks", {(0, "a"), (1, "b"), (1, "a"), (-1, "a")}, own)
    assert stray.status == FAILURE and stray.found.endswith("torchrun on GPU-a; rank 1 on GPU-a")
    assert "set_device" in stray.remedy
    assert judge_contexts("two ranks", set(), own).status == WARNING


def test_contexts_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    assert parse("12, GPU-a\n13, GPU-b\nNo running processes found\n[N/A], GPU-c\n") == [(12, "a"), (13, "b")]
    child = Child([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "a.log", {"LOCAL_RANK": "1"})
    assert child.wait_until(lambda: local_rank(child.process.pid) == 1, 60)

    def answer(*_):
        child.process.kill()
        return f"{child.process.pid}, GPU-a\n1, GPU-b"

    monkeypatch.setattr("preflight.gpu_check.contexts.output_of", answer)
    assert watch(child, 60) == ("killed by SIGKILL", {(1, "a")})


# --- the whole part ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_part_passes_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "preflight.gpu_check", "--parts", "train", "--minutes", "24"]
    command += ["--output", str(tmp_path / "report.md"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    report = (tmp_path / "report.md").read_text()
    assert done.returncode == 0, report
    for case in train.CASES:
        status = NOT_APPLICABLE if case.n_gpus else OK
        assert f"- **{status}** {case.name}: " in report, report
    assert "- **ok** SIGTERM, kill -9, resumed: differs from the CPU's" in report
