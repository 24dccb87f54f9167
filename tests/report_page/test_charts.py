"""Which charts there are of a run, what they show, and how they are drawn."""

import json
import re

import pytest

from report_page.charts import COLOURS, INK, LINES, colour_of, dash_of, draw
from report_page.run_data import read_runs
from report_page.series import charts_of, span_of
from tests.report_page.run_folders import build, full_run, keys, result, row_of


def test_a_chart_that_would_be_empty_is_not_there(tmp_path):
    plain = build(tmp_path / "plain", [row_of(1, kl=0.0, teacher_wait_s=0.0), row_of(2, kl=0.0, teacher_wait_s=0.0)])
    assert keys(plain) == ["loss", "ce", "grad-norm", "lr", "tokens-per-s", "data-wait"]
    assert keys(plain, full_run(tmp_path)) == [
        *("loss", "ce", "kl", "grad-norm", "lr", "skipped", "eval-ce", "eval-kl", "eval-perplexity", "eval-agreement"),
        *("mmlu", "tokens-per-s", "teacher-wait", "data-wait", "mfu", "memory", "moved-0", "moved-1"),
        *("layers-own-1", "layers-stream-1"),
    ]


def test_charts_have_the_numbers_of_their_runs(tmp_path):
    runs = read_runs([full_run(tmp_path), build(tmp_path / "other", [row_of(1)])])
    charts = {chart.key: chart for chart in charts_of(runs)}
    assert charts["teacher-wait"].series[0].value == pytest.approx([0.25] * 10)
    assert charts["loss"].series[1].value.tolist() == [9.75]
    assert list(charts["eval-kl"].series) == [0]
    assert charts["eval-kl"].series[0].step.tolist() == [5, 10] and charts["eval-kl"].series[0].value.tolist() == [
        1,
        0.5,
    ]
    assert [(score.model, score.step) for score in charts["mmlu"].scores[0]] == [("hybrid_ft", 10)]
    assert charts["layers-own-0"].marked == [1]
    assert charts["layers-own-0"].scale == charts["layers-stream-0"].scale == (0.01, 0.3)


def test_steps_begin_at_zero_unless_the_run_began_late(tmp_path):
    early = build(tmp_path / "early", [row_of(1), row_of(100)])
    late = build(tmp_path / "late", [row_of(80), row_of(120)])
    assert span_of(read_runs([early, late])) == (0, 120)
    assert span_of(read_runs([late])) == (80, 120)
    (late / "eval.json").write_text(json.dumps(result("hybrid_ft", 0.3, "late/checkpoint-0")))
    assert span_of(read_runs([late])) == (0, 120)


def test_runs_are_distinct_beyond_the_colours():
    styles = {(colour_of(i), dash_of(i)) for i in range(4 * len(COLOURS))}
    assert len(styles) == 4 * len(COLOURS)


def test_names_are_drawn_as_they_are(tmp_path):
    """A dollar would begin a formula, an underscore hide a label."""
    names = ["_x", "$\\frac{$"]
    runs = read_runs([build(tmp_path / name, [row_of(step) for step in range(1, 4)]) for name in names])
    chart = charts_of(runs)[0]
    pictures = [draw(chart, shown, span_of(runs), "png") for shown in (names, ["", ""])]
    assert pictures[0] != pictures[1] and pictures[0].startswith(b"\x89PNG")


def drawn_texts(chart) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]+)<", draw(chart, ["run"], (0, 10), "svg").decode())


def test_axes_are_labelled_for_what_they_show(tmp_path):
    rows = [row_of(step, data_wait_s=1e-4, skipped_updates=step // 5, grad_norm=10.0**step) for step in range(11)]
    charts = {chart.key: chart for chart in charts_of(read_runs([build(tmp_path / "run", rows)]))}
    steps = ["0", "2", "4", "6", "8", "10", "optimizer steps"]
    assert drawn_texts(charts["data-wait"]) == [*steps, "0%", "1%", "2%", "3%", "4%", "5%"]  # a small share looks small
    assert drawn_texts(charts["skipped"]) == [*steps, "0", "1", "2"]
    assert {"1", "100", "1e+06"} <= set(drawn_texts(charts["grad-norm"]))
    assert {"0", "200", "400"} <= set(drawn_texts(charts["tokens-per-s"]))


def test_a_chart_takes_the_colours_of_the_page(tmp_path):
    runs = read_runs([build(tmp_path / "run", [row_of(1), row_of(2)])])
    svg = draw(charts_of(runs)[0], ["run"], span_of(runs), "svg").decode()
    assert svg.count("var(--ink)") > 5 and svg.count("var(--lines)") > 2
    assert svg.count(INK) == svg.count(LINES) == 1  # where the variables get their values
    assert "@media(prefers-color-scheme:dark){:root{--ink:" in svg and "DejaVu" not in svg


def test_a_layer_map_alone_can_be_drawn(tmp_path):
    for i, own in enumerate(([0.0, 0.0], [1e-6, 1.0], [None, 0.5])):
        runs = read_runs([build(tmp_path / str(i), [row_of(3, layer_map={"own": own})])])
        heat_map = charts_of(runs)[-1]
        assert heat_map.key == "layers-own" and draw(heat_map, ["x"], span_of(runs), "svg")
