"""A run of the stage `align` on the page: its rows by layer, its charts, and rows that are damaged or hostile."""

import json
import math

import numpy as np
import pytest

from report import write_page
from report_page.layer_errors import COLUMNS, LAST_ROWS, alignment_in
from report_page.page import make_page
from report_page.run_data import read_run, read_runs
from report_page.series import charts_of
from report_page.tables import alignment_table, facts_of
from tests.report_page.run_folders import aligned_row, build, keys, options, row_of


def aligned_run(folder, n=40):
    """Builds a run whose layers 2 and 5 begin at 0.8 and 0.5 and fall to a half."""
    rows = [
        aligned_row(step, {2: 0.8 * (1 if step < 4 else 0.5), 5: 0.5 * (1 if step < 4 else 0.5)})
        for step in range(1, n + 1)
    ]
    run = build(folder, rows)
    options(run, layers=[0, 1, 3], stage="align")
    return run


def test_the_charts_of_an_alignment(tmp_path):
    """Its loss is no nats, and it has neither CE nor KL; layers that are the teacher's have no error."""
    run = aligned_run(tmp_path / "run")
    assert keys(run) == [
        *("align-mean", "align-worst", "align-loss", "grad-norm", "lr", "tokens-per-s", "data-wait", "align-layers")
    ]
    charts = {chart.key: chart for chart in charts_of(read_runs([run]))}
    units = {charts[key].unit for key in ("align-mean", "align-worst", "align-layers")}
    assert units == {"relative to the attention's output"}
    assert charts["align-mean"].series[0].value[[0, -1]] == pytest.approx([0.65, 0.325])
    assert charts["align-worst"].series[0].value[[0, -1]] == pytest.approx([0.8, 0.4])
    heat_map = charts["align-layers"]
    assert heat_map.layers.error[[2, 5]][:, [0, -1]] == pytest.approx(np.array([[0.8, 0.4], [0.5, 0.25]]))
    assert np.isnan(heat_map.layers.error[[0, 1, 3, 4]]).all() and heat_map.marked == [0, 1, 3]


def test_beside_a_distillation_each_has_its_own_loss(tmp_path):
    runs = [aligned_run(tmp_path / "a"), build(tmp_path / "b", [row_of(1), row_of(2)])]
    charts = {chart.key: chart for chart in charts_of(read_runs(runs))}
    assert list(charts["align-loss"].series) == [0] and list(charts["loss"].series) == [1]
    assert charts["loss"].unit == "nats per token" and "nats" not in charts["align-loss"].unit
    assert "align-layers-0" in charts and "align-layers-1" not in charts
    table = alignment_table(read_runs(runs))
    assert [row[:2] for row in table[1:]] == [["a", "2"], ["a", "5"]]


def test_the_page_has_the_start_and_the_end_of_every_layer(tmp_path):
    run = aligned_run(tmp_path / "run")
    page = write_page([run], None).read_text()
    assert "<summary>Each layer</summary>" in page and page.index("<h2>Alignment") < page.index("<h2>Training")
    (found,) = read_runs([run])
    end = f"at the end (median of {LAST_ROWS} rows)"
    assert alignment_table([found]) == [
        ["layer", "error in the first step", end, "ratio"],
        ["2", "0.8000", "0.4000", "0.5000"],
        ["5", "0.5000", "0.2500", "0.5000"],
    ]
    text = "0.6500 in the first step, 0.3250 at the end; the largest there is 0.4000, of layer 2"
    assert facts_of(found)["Error of the layers"] == text
    assert not {"CE", "KL"} & facts_of(found).keys()


def test_a_distillation_names_the_alignment_that_it_began_from(tmp_path):
    checkpoint = tmp_path / "aligned" / "checkpoint-20"
    checkpoint.mkdir(parents=True)
    run = build(tmp_path / "run", [row_of(1)])
    options(run, student_model=str(checkpoint))
    assert "Began from" not in facts_of(read_run(run, "run"))  # a student like any other
    for stage, how in (("align", "aligned"), ("distil", "distilled"), (None, "distilled")):
        arguments = {} if stage is None else {"stage": stage}
        (checkpoint / "training_state.json").write_text(json.dumps({"tokens": 51200, "arguments": arguments}))
        assert facts_of(read_run(run, "run"))["Began from"] == f"{checkpoint}, {how} with 51,200 tokens"
    for damaged in ("{", "[1]", '{"tokens": "x", "arguments": 7}'):
        (checkpoint / "training_state.json").write_text(damaged)
        assert facts_of(read_run(run, "run")).get("Began from", "") in ("", f"{checkpoint}, distilled")


@pytest.mark.parametrize("n_rows", [1, COLUMNS, COLUMNS + 1, 3 * COLUMNS + 7])
def test_a_long_run_is_shortened_to_means_of_stretches(n_rows):
    rows = [{"step": step, "alignment": {"layers": [1], "errors": [float(step)]}} for step in range(1, n_rows + 1)]
    step, error = alignment_in(rows).errors
    assert len(step) == min(n_rows, COLUMNS) and np.isnan(error[0]).all()
    assert error[1] == pytest.approx(step)  # both are means of the same rows
    assert np.all(np.diff(step) > 0) and alignment_in(rows).mean.tolist() == [row["step"] for row in rows]


def test_a_skipped_step_is_a_gap(tmp_path):
    rows = [aligned_row(1, {0: None, 1: 0.5}), aligned_row(2, {0: 0.4, 1: 0.5}), aligned_row(3, {0: None, 1: 0.3})]
    found = read_run(build(tmp_path / "run", rows), "run").alignment
    assert found.first == {0: 0.4, 1: 0.5} and found.last == {0: 0.4, 1: 0.5}
    assert np.isnan(found.mean).tolist() == [True, False, True]
    np.testing.assert_array_equal(found.errors.error, [[math.nan, 0.4, math.nan], [0.5, 0.5, 0.3]])


HOSTILE = [
    *(None, 7, [], "x", {}, {"layers": [0]}, {"errors": [0.5]}, {"layers": 0, "errors": 0.5}),
    {"layers": [10**9, -1, True, 0.5, "0", None, [0]], "errors": [0.5] * 7},
    {"layers": {"0": 1}, "errors": [0.5]},
]


@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_alignment_is_left_out(tmp_path, value):
    run = build(tmp_path / "run", [row_of(1), row_of(2) | {"alignment": value}])
    assert read_run(run, "run").alignment is None and "align-mean" not in keys(run)
    assert write_page([run], None).is_file()


def test_errors_that_cannot_be_used_are_gaps(tmp_path):
    errors = [1e308, "x", None, True, [1], 0.5]
    rows = [aligned_row(1, {layer: 0.5 for layer in range(6)}), row_of(2)]
    rows[1]["alignment"] = {"layers": [0, 1, 2, 3, 4, 5, 6], "errors": errors}
    run = build(tmp_path / "run", rows)
    found = read_run(run, "run")
    assert np.isnan(found.alignment.errors.error[:, 1]).tolist() == [True] * 5 + [False]
    assert found.too_large == 1 and "1 numbers are left out" in make_page([found], [], [])
    assert write_page([run], None).is_file()


def test_errors_that_are_no_numbers_at_all_leave_a_page(tmp_path):
    run = build(tmp_path / "run", [aligned_row(1, {0: None, 3: None})])
    assert not {"align-mean", "align-layers"} & set(keys(run))
    assert "Error of the layers" not in facts_of(read_run(run, "run"))
    assert write_page([run], None).is_file()
