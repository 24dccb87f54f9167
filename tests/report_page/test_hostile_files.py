"""Run directories that somebody wrote to break the report: every page is drawn, without what cannot be used."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from report import write_page
from report_page.charts import draw
from report_page.page import make_page
from report_page.run_data import read_run, read_runs
from report_page.series import charts_of, span_of
from report_page.tables import option_tables
from tests.report_page.run_folders import build, result, row_of
from utils import boot_id

DEEP = "[" * 100_000 + "]" * 100_000
FIGURES = ("loss", "ce", "kl", "lr", "grad_norm", "tokens", "tokens_per_s", "step_time_s", "teacher_wait_s", "mfu")


def page_of(folder: Path) -> str:
    runs = read_runs([folder])
    drawings = charts_of(runs)
    return make_page(runs, drawings, [draw(drawing, ["run"], span_of(runs), "svg") for drawing in drawings])


@pytest.mark.parametrize("value", [1e308, -1.7976931348623157e308])
def test_a_figure_that_no_chart_can_show_is_left_out_and_counted(tmp_path, value):
    rows = [row_of(step) for step in range(1, 5)]
    rows[2] |= dict.fromkeys(FIGURES, value) | {"eval": {"ce": value, "perplexity": 9.0}, "layer_map": {"own": [value]}}
    run = build(tmp_path / "run", rows)
    assert "run: 12 numbers are left out: they are beyond 1e+100, and no chart can show them." in page_of(run)
    assert np.isnan(read_run(run, "run").columns["loss"]).tolist() == [False, False, True, False]


@pytest.mark.parametrize("value", [1e100, -1e100, 5e-324])
def test_the_largest_and_smallest_figures_are_drawn(tmp_path, value):
    rows = [row_of(step) | (dict.fromkeys(FIGURES, value) if step % 2 else {}) for step in range(1, 5)]
    assert "are left out" not in page_of(build(tmp_path / "run", rows))


@pytest.mark.parametrize("step", [1e308, -1, 0.5, 2**53 + 2, 10**400, "3", True, None, [1]])
def test_a_row_whose_step_is_none_is_damaged(tmp_path, step):
    run = read_run(build(tmp_path / "run", [row_of(1), row_of(2) | {"step": step}, row_of(3)]), "run")
    assert run.step.tolist() == [1, 3] and run.damaged == 1


def test_json_and_yaml_that_take_too_much_are_left_out(tmp_path):
    run = build(tmp_path / "run", [row_of(1)], f'{{"step": 2, "x": {DEEP}}}\n')
    for name in ("status.json", "warnings.jsonl", "eval.json"):
        (run / name).write_text(DEEP)
    lines = [
        f"{'abcdefghij'[i]}: &{'abcdefghij'[i]} [{', '.join(['*' + 'abcdefghij'[i - 1]] * 9)}]" for i in range(1, 10)
    ]
    for options in ("\n".join(["a: &a [1]", *lines]), f"seed: {DEEP[:5000]}"):
        (run / "args.yaml").write_text(options)
        (found,) = read_runs([run])
        assert (found.damaged, found.status, found.options, found.warnings, found.scores) == (1, {}, {}, [], [])


def test_options_that_no_option_can_have_are_left_out(tmp_path):
    run = build(tmp_path / "run", [row_of(1, layer_map={"own": [0.5, 0.2]})])
    (run / "args.yaml").write_text(
        f"preset: ../../tmp\nlayers: [-5, 99999999999999999999, 1]\nseed: 0x{'f' * 9000}\nlog_interval: {{a: [1]}}\n"
    )
    (found,) = read_runs([run])
    assert set(found.options) == {"preset", "layers"} and option_tables([found])
    assert all(draw(drawing, ["run"], span_of([found]), "png") for drawing in charts_of([found]))


def test_what_is_no_file_is_not_read(tmp_path):
    """Reading a pipe would wait forever."""
    names = ("status.json", "eval.json", "args.yaml", "warnings.jsonl", "metrics.abandoned.jsonl")
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)):
        run = build(tmp_path / f"run{len(list(tmp_path.iterdir()))}", [row_of(1)])
        (run / "status.json").unlink()
        for name in names:
            make(run / name)
        (found,) = read_runs([run])
        assert (found.status, found.options, found.warnings, found.abandoned) == ({}, {}, [], 0)


def test_names_that_are_no_text_are_drawn(tmp_path):
    names = ["\ud800", "a\nb\0\x1b[2J", "<b>|`"]
    run = build(tmp_path / "run", [row_of(1, update_health=dict.fromkeys(names, 0.5))])
    (run / "eval.json").write_text(json.dumps(result(names[0], 0.5, f"/x/run/checkpoint-{'1' * 5000}")))
    page = write_page([run], None).read_text()
    assert "&lt;b&gt;|`" in page and "<b>" not in page
    runs = read_runs([run]) * 2
    assert draw(charts_of(runs)[0], names[:2], span_of(runs), "png")


@pytest.mark.parametrize(
    ("pid", "expected"),
    [
        (2**31 - 1, "it was killed, or runs on another machine; there is no process 2147483647 on this one"),
        *((pid, "it is still running, or was killed") for pid in (None, -1, 10**30, "1", True)),
    ],
)
def test_a_run_without_an_end_may_have_been_killed(tmp_path, pid, expected):
    run = build(tmp_path / "run", [row_of(1)], status={"status": "running", "pid": pid})
    assert f"run: has not reported its end: {expected}." in make_page(read_runs([run]), [], [])


def test_a_run_without_an_end_may_be_alive(tmp_path):
    run = build(tmp_path / "run", [row_of(1)], status={"status": "running", "pid": os.getpid(), "boot": boot_id()})
    alive = f"run: has not reported its end: a process {os.getpid()} is running."
    assert alive in make_page(read_runs([run]), [], [])


@pytest.mark.parametrize("boot", [None, "", 7, "of another machine, or an earlier one of this"])
def test_a_process_of_another_boot_says_nothing_of_a_run(tmp_path, boot):
    run = build(tmp_path / "run", [row_of(1)], status={"status": "running", "pid": os.getpid(), "boot": boot})
    page = make_page(read_runs([run]), [], [])
    assert "run: has not reported its end: it is still running, or was killed." in page


@pytest.mark.parametrize("stderr", [-0.01, float("nan"), float("inf"), None])
def test_a_standard_error_that_is_none_is_left_out(tmp_path, stderr):
    run = build(tmp_path / "run", [row_of(1)])
    score = result("hybrid_ft", 0.5, "/x/run/checkpoint-2") | {"stderr": stderr}
    (run / "eval.json").write_text(json.dumps(score))
    page = write_page([run], None).read_text()
    assert "<td>0.5000</td>" in page


def test_holes_and_repeated_rows_are_said(tmp_path):
    run = build(tmp_path / "run", [row_of(step) for step in (7, 8, 8, 8, 12)])
    page = make_page(read_runs([run]), [], [])
    assert "run: 3 steps between the first row and the last have no row." in page
    assert "run: 2 rows of metrics.jsonl are left out: a later row has the same step." in page
