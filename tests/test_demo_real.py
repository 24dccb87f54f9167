"""`make demo-real` with a few steps of each stage, on the real teacher: `make test-real`. It needs the teacher's wheel,
which `make demo-real` downloads once; it is not downloaded here.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from presets.smollm2 import cached_wheel
from tests.small_runs import read_metrics
from tests.waiting import wait_until

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not cached_wheel().is_file(), reason="the real teacher was never downloaded: make demo-real"),
]

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "teachers" / "smollm2-135m"
STEPS = 8
EPOCH = 2  # steps; the same few windows come again and again, so that the first and the last steps can be compared
TRAIN = f"--max_steps {STEPS} --epochs {STEPS} --batch_size 1 --warmup_steps 2 --decay_ratio 0.5"
TRAIN += f" --save_interval 2 --save_total_limit 2 --eval_interval {STEPS} --eval_windows 2"
TRAIN += f" --layer_map_interval {STEPS}"
SETTINGS = {
    "REAL_MAKE": "--calibration_tokens 1024 --held_out_tokens 256",
    "REAL_START": "--windows 2",
    "REAL_EVAL": "--held_out_windows 2 --retrieval_questions 4 --retrieval_pairs 4",
}


def start(folder: Path, target: Path | str) -> subprocess.Popen:
    teacher = TEACHER if (TEACHER / "config.json").is_file() else folder / "teacher"
    train = f"{TRAIN} --dataset_name {folder / 'few.jsonl'}"
    variables = {"REAL": folder, "REAL_TEACHER": teacher, "REAL_ALIGN": train, **SETTINGS}
    variables["REAL_DISTIL"] = f"{train} --max_lr 0.0003"  # of few windows, often seen
    given = [f"{name}={value}" for name, value in {"BIN": Path(sys.executable).parent, **variables}.items()]
    done = ["--old-file=.venv/installed", "--old-file=.venv/installed-gguf"]
    return subprocess.Popen(["make", *done, *given, str(target)], cwd=ROOT, text=True, stderr=subprocess.PIPE)


def make(folder: Path, target: Path | str) -> None:
    process = start(folder, target)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]


def stop_in_training(folder: Path) -> int:
    """Starts the last training and asks it to stop after three steps; returns the exit code of make."""
    process, run = start(folder, folder / "distilled"), folder / "distil"
    metrics = run / "metrics.jsonl"
    wait_until(lambda: process.poll() is not None or (metrics.exists() and metrics.read_text().count("\n") >= 3), 900)
    os.kill(json.loads((run / "status.json").read_text())["pid"], signal.SIGTERM)
    process.communicate()
    return process.returncode


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Makes the demo, whose last training is stopped on the way; returns the folder, and how the stop ended."""
    folder = tmp_path_factory.mktemp("real") / "demo"
    make(folder, folder / "text" / "train.jsonl")
    with (folder / "text" / "train.jsonl").open() as rows:
        text = "\n\n".join(json.loads(next(rows))["text"] for _ in range(3))
    (folder / "few.jsonl").write_text(json.dumps({"text": text[:2700]}) + "\n")  # two windows
    make(folder, folder / "aligned")
    stopped = stop_in_training(folder)
    is_marked = (folder / "distilled").exists()
    make(folder, "demo-real")
    return folder, stopped, is_marked


def rows_of(folder: Path, stage: str) -> list[dict]:
    rows = read_metrics(folder / stage)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return rows


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_the_closed_form_begins_far_below_no_mixers_and_copied_projections(demo):
    found = json.loads((demo[0] / "start.json").read_text())
    for starts in found.values():
        kl = {name: figures["kl"] for name, figures in starts.items()}
        assert kl["closed_form"] < 0.5 * min(kl["zero"], kl["projections"])


def test_alignment_lowers_the_error_of_every_layer(demo):
    rows = [row["alignment"] for row in rows_of(demo[0], "align")]
    layers = rows[0]["layers"]
    assert layers == [2, 4, 6, 7, 9, 10, 12, 13, 14, 15, 24, 25, 26, 28, 29]
    for i in range(len(layers)):
        errors = [row["errors"][i] for row in rows]
        assert mean(errors[-EPOCH:]) < mean(errors[:EPOCH])


def test_the_kl_falls_and_never_jumps(demo):
    kl = [row["kl"] for row in rows_of(demo[0], "distil")]
    assert mean(kl[-EPOCH:]) < 0.9 * mean(kl[:EPOCH])
    assert max(kl) <= 1.5 * kl[0]


def test_a_training_that_was_stopped_resumed_where_it_was(demo):
    folder, stopped, is_marked = demo
    assert stopped != 0 and not is_marked
    rows_of(folder, "distil")  # each step once
    assert json.loads((folder / "distil" / "status.json").read_text())["status"] == "complete"
    assert not (folder / "distil" / "metrics.abandoned.jsonl").exists()


def test_what_is_done_is_not_done_again(demo):
    folder = demo[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    make(folder, "demo-real")
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_report_has_every_part(demo):
    page, found = (demo[0] / "report.md").read_text(), json.loads((demo[0] / "report.json").read_text())
    assert (demo[0] / "report" / "index.html").exists()
    models = found["models"]
    assert models["hybrid_ft"]["held_out"]["kl"] < models["hybrid"]["held_out"]["kl"]
    assert models["teacher"]["copying"]["acc"] > 0.3
    for answers in found["answers"]:
        assert answers["teacher"] and answers["hybrid"] and answers["prompt"].split()[0] in page
    assert "Paris" in found["answers"][0]["teacher"]
