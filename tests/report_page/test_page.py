"""Reports of run directories that are built by hand: what is read of them, what is drawn, what stands in the page, and
that a browser shows it.
"""

import base64
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import yaml

import report
from processes.exits import run_entry
from report import write_report
from report_page.charts import COLOURS, INK, LINES, colour_of, dash_of, draw
from report_page.page import make_page
from report_page.run_data import Series, distinct_names, read_options, read_run, read_runs, read_scores, read_warnings
from report_page.series import charts_of, is_log, smooth, smoothing_width, span_of, thin
from report_page.tables import facts_of, measure_table, option_tables, score_table, summary_table, warning_table

NASTY = "<script>document.title='hit'</script>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def row_of(step: int, **more) -> dict:
    """A step of 2 s, of which the device waits 0.5 s for the teacher and 0.1 s for data; CE falls by 0.5 a step."""
    ce = 10 - 0.5 * step
    row = {"step": step, "micro_step": 2 * step, "loss": ce + 0.25, "ce": ce, "kl": 2.5, "lr": 1e-3, "grad_norm": 1.0}
    row |= {"tokens": 1000 * step, "tokens_per_s": 500.0, "step_time_s": 2.0, "teacher_wait_s": 0.5}
    return row | {"data_wait_s": 0.1, "skipped_updates": 0, "ignored_labels": 0.0} | more


def build(folder: Path, rows: list[dict], after: str = "", **files) -> Path:
    """A run directory. after: what follows the last whole line. files: content of those beside it, by their stem."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + after)
    for name, content in {"status": {"status": "complete", "text": "complete: all"}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def options(folder: Path, **values) -> None:
    (folder / "args.yaml").write_text(yaml.safe_dump({"preset": "tiny", "output_dir": str(folder), **values}))


def result(which: str, acc: float, ckpt: str | None = None) -> dict:
    return {"acc": acc, "stderr": 0.01, "n": 400, "config": {"which": which, "ckpt": ckpt}}


def full_run(folder: Path, name: str = "full") -> Path:
    """One that has everything."""
    rows = [row_of(step, mfu=0.4, memory_gb=10.0 + step) for step in range(1, 11)]
    rows[3] |= {"loss": None, "ce": None, "kl": None, "grad_norm": None}
    for row in rows[3:]:
        row["skipped_updates"] = 1
    for row, scale in ((rows[4], 1.0), (rows[9], 0.5)):
        row["update_health"] = {"mixers": 0.9, NASTY: 0.8}
        row["eval"] = {"loss": 1.0, "ce": 3 * scale, "kl": scale, "perplexity": 20.0, "agreement": 0.5, "mmlu": 0.3}
        row["layer_map"] = {"own": [0.2 * scale, 0.0, 0.01], "stream": [0.2 * scale, None, 0.3]}
    scores = {"student": 0.25, "hybrid_ft": 0.5, "n": 400}
    models = {
        "student": result("student", 0.25),
        "hybrid_ft": result("hybrid_ft", 0.5, f"/elsewhere/{name}/checkpoint-20"),
    }
    run = build(folder / name, rows, eval={**scores, "models": models, "differences": []})
    options(run, layers=[1], max_steps=10, seed=7, dataset_name=NASTY)
    (run / "metrics.abandoned.jsonl").write_text('{"step": 9}\n{"ste')
    warned = [{"time": 60.0 * i, "rank": i % 2, "text": f"step {i}: {NASTY}"} for i in range(3)]
    warned += [{"time": 600.0, "rank": 0, "text": "the disk is full"}]
    (run / "warnings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in warned) + '{"time": 1')
    return run


class Parsed(HTMLParser):
    """What a browser would make of a page, as far as the tests ask."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "line"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag == "line":  # a browser's own text of a page closes it
            return
        assert self.open.pop() == tag, "tags have to nest"

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data

    def images(self) -> dict[str, bytes]:
        """SVG by alt text."""
        prefix = "data:image/svg+xml;base64,"
        found = [attributes for tag, attributes in self.tags if tag == "img"]
        assert all(attributes["src"].startswith(prefix) for attributes in found)
        return {image["alt"]: base64.b64decode(image["src"].removeprefix(prefix)) for image in found}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run that has everything, with its report."""
    run = full_run(tmp_path_factory.mktemp("one"))
    return run, write_report([run], None)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Runs of one name; of the second nothing but its rows is there."""
    folder = tmp_path_factory.mktemp("two")
    runs = [full_run(folder / "a"), build(folder / "b" / "full", [row_of(step) for step in range(1, 6)])]
    (runs[1] / "status.json").unlink()
    return runs, write_report(runs, folder / "out" / "both.html")


# What is read


def test_a_null_is_a_gap_and_a_line_that_is_cut_is_left_out(tmp_path):
    rows = [row_of(1), row_of(2, loss=None, kl=math.inf), row_of(3)]
    run = read_run(build(tmp_path / "run", rows, '{"step": 4, "lo'), "run")
    assert run.step.tolist() == [1, 2, 3] and run.is_cut and run.damaged == 0
    assert np.isnan(run.columns["loss"]).tolist() == [False, True, False]
    assert np.isnan(run.columns["kl"]).tolist() == [False, True, False]
    assert np.isnan(run.columns["mfu"]).all()


def test_a_last_line_without_its_end_is_a_row_if_it_is_whole(tmp_path):
    run = read_run(build(tmp_path / "run", [row_of(1)], json.dumps(row_of(2))), "run")
    assert run.step.tolist() == [1, 2] and not run.is_cut


def test_damaged_lines_are_counted_and_of_a_step_the_last_row_counts(tmp_path):
    text = '{"step"\n[]\n\n{"step": null}\n\xff\n' + json.dumps(row_of(1, loss=7.0)) + "\n"
    run = read_run(build(tmp_path / "run", [row_of(1), row_of(2)], text), "run")
    assert run.damaged == 4 and not run.is_cut
    assert run.columns["loss"].tolist() == [7.0, 9.25]


def test_layer_maps_become_layers_by_steps(tmp_path):
    run = read_run(full_run(tmp_path), "run")
    own, stream = run.layer_maps["own"], run.layer_maps["stream"]
    assert own.step.tolist() == [5, 10] and own.error.tolist() == [[0.2, 0.1], [0, 0], [0.01, 0.01]]
    assert np.isnan(stream.error[1]).all() and stream.error[2].tolist() == [0.3, 0.3]


def test_a_map_of_fewer_layers_than_another_has_gaps(tmp_path):
    rows = [row_of(1, layer_map={"own": [1.0]}), row_of(2, layer_map={"own": [1.0, 2.0], "stream": []})]
    run = read_run(build(tmp_path / "run", rows), "run")
    np.testing.assert_array_equal(run.layer_maps["own"].error, [[1, 1], [np.nan, 2]])
    assert "stream" not in run.layer_maps


def test_options_come_from_the_file_else_from_the_newest_checkpoint(tmp_path):
    assert read_options(tmp_path) == {}
    for micro_step in (9, 10, 2):
        (tmp_path / f"checkpoint-{micro_step}").mkdir()
        state = {"arguments": {"seed": micro_step}}
        (tmp_path / f"checkpoint-{micro_step}" / "training_state.json").write_text(json.dumps(state))
    (tmp_path / "args.yaml").write_text("seed: [")
    assert read_options(tmp_path) == {"seed": 10}
    (tmp_path / "args.yaml").write_text("seed: 1\nlayers: [1, 2]\n")
    assert read_options(tmp_path) == {"seed": 1, "layers": [1, 2]}


def test_warnings_that_differ_in_numbers_are_counted_together(tmp_path):
    first, second = read_warnings(full_run(tmp_path) / "warnings.jsonl")
    assert first == (f"step 0: {NASTY}", 3, (0, 1), 0.0, 120.0)
    assert second == ("the disk is full", 1, (0,), 600.0, 600.0)
    assert read_warnings(tmp_path / "none") == []


def test_scores_of_checkpoints_of_this_run_have_their_step(tmp_path):
    run = tmp_path / "run"
    build(
        run,
        [row_of(1)],
        one=result("hybrid_ft", 0.4, "/x/run/checkpoint-2"),
        zero=result("hybrid_ft", 0.3, "run/checkpoint-0"),
    )
    (run / "other.json").write_text(json.dumps(result("hybrid_ft", 0.2, "/x/another/checkpoint-2")))
    (run / "unknown.json").write_text(json.dumps(result("hybrid_ft", 0.1, "/x/run/checkpoint-7")))
    (run / "list.json").write_text("[1]")
    (run / "held-out.json").write_text(json.dumps({"held_out": {"ce": 1.0}, "config": {"which": "teacher"}}))
    found = {score.file: score for score in read_scores(run, {2.0: 1.0})}
    assert found["one.json"] == ("one.json", "hybrid_ft", 0.4, 0.01, 400, 1.0)
    assert {name: score.step for name, score in found.items()} == {
        "one.json": 1.0,
        "zero.json": 0.0,
        "other.json": None,
        "unknown.json": None,
    }


def test_measures_beside_mmlu_have_rows_too(tmp_path):
    figures = {"acc,none": 0.6, "acc_stderr,none": 0.1, "acc_norm,none": 0.7}
    found = {
        "held_out": {"ce": 3.0, "kl": 0.5, "agreement": None, "perplexity": 20.0, "tokens": 99},
        "retrieval": [{"length": 64, "pairs": 4, "n": 2, "acc": 0.5}, {"length": 128}, 7],
        "tasks": {"arc": {"results": {"arc_easy": figures, "bad": 3, "none": {}}}, "broken": []},
    }
    damaged = {"held_out": [], "retrieval": {}, "tasks": {"arc": {"results": None}}, "config": {"which": "student"}}
    config = {"which": "hybrid_ft", "ckpt": "/x/run/checkpoint-2"}
    run = build(tmp_path / "run", [row_of(1)], beyond={**found, "config": config}, damaged=damaged)
    assert score_table(read_runs([run])) == []
    assert measure_table(read_runs([run])) == [
        ["model", "measure", "value", "step", "file"],
        ["hybrid_ft", "held-out perplexity", "20.0000", "1", "beyond.json"],
        ["hybrid_ft", "held-out KL", "0.5000", "1", "beyond.json"],
        ["hybrid_ft", "retrieval, 64 tokens, 4 pairs", "0.5000", "1", "beyond.json"],
        ["hybrid_ft", "arc_easy, acc", "0.6000", "1", "beyond.json"],
    ]
    assert "<td>held-out KL</td>" in make_page(read_runs([run]), [], [])


def test_numbers_out_of_all_bounds_are_left_out(tmp_path):
    rows = [row_of(1), row_of(2, loss=10**400, eval={"ce": 10**400}, layer_map={"own": [10**400, 1.0]})]
    run = build(tmp_path / "run", rows, json.dumps({"step": 10**400}) + "\n", score=result("student", 10**400))
    (run / "status.json").write_text(json.dumps({"status": "running", "launched": 1e20}))
    warned = [{"time": time, "rank": 0, "text": "warned"} for time in (1e300, 10**400)]
    (run / "warnings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in warned))
    (found,) = read_runs([run])
    assert np.isnan(found.columns["loss"]).tolist() == [False, True] and found.damaged == 1 and found.scores == []
    assert "Started" not in facts_of(found) and warning_table([found])[1][3:] == ["–", "–"]
    assert write_report([run], None).is_file()


def test_names_are_told_apart_by_as_little_as_it_takes():
    assert distinct_names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert distinct_names([Path("/a/b/x"), Path("/c/b/x")]) == ["a/b/x", "c/b/x"]


def test_a_directory_that_is_named_twice_is_one_run(tmp_path):
    build(tmp_path / "run", [row_of(1)])
    (tmp_path / "link").symlink_to("run")
    assert [run.name for run in read_runs([tmp_path / "run", tmp_path / "link"])] == ["run"]


# What is drawn


def test_thinning_keeps_every_extreme_and_the_gaps():
    values = np.sin(np.arange(10_000) / 300)
    values[1234], values[8765] = 50, -50
    values[5000:5200] = np.nan
    thinned = thin(Series(np.arange(10_000), values), buckets=100)
    assert len(thinned.step) <= 200 and np.all(np.diff(thinned.step) > 0)
    assert thinned.value[thinned.step == 1234] == 50 and thinned.value[thinned.step == 8765] == -50
    assert np.isnan(thinned.value).sum() == 2  # two whole stretches of a hundred
    shown = ~np.isnan(thinned.value)
    assert np.array_equal(thinned.value[shown], values[thinned.step[shown]])


def test_a_short_series_is_not_thinned():
    series = Series(np.arange(200), np.arange(200.0))
    assert thin(series, buckets=100) is series


def test_smoothing_is_a_running_median():
    values = np.arange(2000.0)
    values[700] = 1e30
    values[900] = np.nan
    smoothed = smooth(Series(np.arange(1, 2001), values), places=50)
    assert smoothing_width(2000) == 41 and len(smoothed.step) == 50
    assert (smoothed.step[0], smoothed.step[-1]) == (1, 2000)
    assert np.abs(smoothed.value[1:-1] - (smoothed.step[1:-1] - 1)).max() <= 1
    assert smoothed.value[0] == 10 and smoothed.value[-1] == 1989  # of the half of the window that there is


def test_the_window_grows_with_the_run():
    assert [smoothing_width(n) for n in (1, 29, 30, 449, 500, 100_000)] == [1, 1, 9, 9, 11, 2001]


def test_few_rows_are_shown_as_they_are_and_a_stretch_without_values_stays_one():
    series = Series(np.arange(29), np.arange(29.0))
    assert smooth(series) is series
    assert np.isnan(smooth(Series(np.arange(100), np.full(100, np.nan))).value).all()


@pytest.mark.parametrize(
    "values,expected",
    [([1, 30], True), ([1, 29], False), ([0, 100], False), ([-1, 100], False), ([np.nan, 1, 50], True), ([], False)],
)
def test_an_axis_is_logarithmic_for_what_is_positive_and_far_apart(values, expected):
    assert is_log(np.array(values, dtype=float)) is expected


def keys(*runs: Path) -> list[str]:
    return [chart.key for chart in charts_of(read_runs(list(runs)))]


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


def test_runs_are_told_apart_beyond_the_colours():
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


# Numbers and tables


def test_the_summary_has_the_numbers(one):
    facts = facts_of(read_run(one[0], "full"))
    assert facts.pop("Last row").endswith(" UTC")
    assert facts == {
        "Ended": "complete: all",
        "Optimizer steps": "10 (--max_steps 10)",
        "Tokens": "10,000 (1,000 a step)",
        "Time of steps": "20 s",
        "Loss": "5.2500, lowest 5.2500 at step 10",
        "CE": "5.0000, lowest 5.0000 at step 10",
        "KL": "2.5000, lowest 2.5000 at step 1",
        "Throughput, median": "500 tokens/s",
        "MFU, median": "40.0%",
        "Waiting for the teacher": "25.0% of the time",
        "Waiting for data": "5.0% of the time",
        "Peak memory, rank 0": "20.0 GB",
        "Skipped updates": "1",
        "Last evaluation": "step 10: CE 1.5, KL 0.5, perplexity 20, agreement 0.5, MMLU 0.3",
    }


def test_what_a_run_does_not_tell_is_not_in_its_summary(tmp_path):
    facts = facts_of(read_run(build(tmp_path / "run", [{"step": 3, "loss": None}], status=[]), "run"))
    assert set(facts) == {"Last row", "Optimizer steps"}


@pytest.mark.parametrize(
    "seconds,text", [(90, "90 s"), (3600, "60 min"), (45_240, "12 h 34 min"), (266_400, "3 d 2 h")]
)
def test_durations_are_in_units_that_can_be_read(tmp_path, seconds, text):
    run = read_run(build(tmp_path / "run", [row_of(1, step_time_s=float(seconds))]), "run")
    assert facts_of(run)["Time of steps"] == text


def test_options_where_runs_differ_come_first(tmp_path):
    folders = [build(tmp_path / name, [row_of(1)]) for name in "ab"]
    options(folders[0], seed=0, layers=[1, 3], max_lr=0.01, dtype="float32")
    options(folders[1], seed=1, layers=[1, 3], max_lr=0.01, dtype="float32")
    tables = option_tables(read_runs(folders))
    differing, changed, every = tables.values()
    assert list(tables)[0] == "Where the runs differ"
    assert differing == [["option", "a", "b"], ["seed", "0", "1"]]
    assert ["max_lr", "0.01", "0.01", "0.005"] in changed and ["seed", "0", "1", "0"] in changed
    assert "dtype" not in [row[0] for row in changed] and "output_dir" not in [row[0] for row in changed]
    assert len(every) == 7


def test_options_of_an_unknown_preset_are_compared_with_the_plain_defaults(tmp_path):
    folder = build(tmp_path / "run", [row_of(1)])
    options(folder, preset="../gone", seed=0, epochs=3, news=[])
    changed = option_tables(read_runs([folder]))["Changed from the defaults, or the preset's"]
    assert changed[1:] == [["epochs", "3", "1"], ["news", "none", "–"], ["preset", "../gone", "llamba-8b"]]


def test_tables_name_the_run_where_there_are_several(one, two):
    alone, both = read_runs([one[0]]), read_runs(two[0])
    assert score_table(alone) == [
        ["model", "MMLU accuracy ± stderr", "questions", "step", "file"],
        ["student", "0.2500 ± 0.0100", "400", "–", "eval.json"],
        ["hybrid_ft", "0.5000 ± 0.0100", "400", "10", "eval.json"],
    ]
    assert [row[0] for row in score_table(both)] == ["run", "a/full", "a/full"]
    assert warning_table(alone)[2] == ["the disk is full", "1", "0", "1970-01-01 00:10 UTC", "1970-01-01 00:10 UTC"]
    assert warning_table(both)[1][:4] == ["a/full", f"step 0: {NASTY}", "3", "0, 1"]
    table = {row[0]: row[1:] for row in summary_table(both)}
    assert table[""] == ["a/full", "b/full"] and table["MFU, median"] == ["40.0%", "–"]


def test_very_many_kinds_of_warnings_do_not_fill_the_page(tmp_path):
    run = build(tmp_path / "run", [row_of(1)])
    lines = [json.dumps({"time": 0, "rank": 0, "text": "x" * i}) for i in range(1, 61)]
    (run / "warnings.jsonl").write_text("\n".join(lines))
    table = warning_table(read_runs([run]))
    assert len(table) == 52 and table[-1][0] == "and 10 more kinds, in warnings.jsonl"


# The page


def test_the_page_tells_of_the_run(one):
    run, page = one
    assert page == run / "report" / "index.html"
    parsed = Parsed(page.read_text())
    assert parsed.texts["h1"] == ["full "] and parsed.texts["title"] == ["full"]
    assert "complete" in parsed.texts["span"]
    assert parsed.texts["h2"] == [
        *("Summary", "Training", "Evaluation", "Speed and memory", "Weights that moved", "Layers against the teacher"),
        *("Scores", "Options", "Warnings"),
    ]
    assert dict(zip(parsed.texts["dt"], parsed.texts["dd"], strict=True)) == facts_of(read_run(run, "full"))
    assert (
        "full: 2 rows were computed again after the run had stopped; the first ones are left out." in parsed.texts["p"]
    )
    assert {"dataset_name", "hybrid_ft", "the disk is full", "0.2500 ± 0.0100"} <= set(parsed.texts["td"])


def test_every_chart_is_a_picture_with_words(one):
    images = Parsed(one[1].read_text()).images()
    assert len(images) == len(keys(one[0])) == 20
    assert all(svg.startswith(b"<?xml") and b"</svg>" in svg for svg in images.values())
    assert "Cross entropy over optimizer steps: full from 9.5 to 5, between 5 and 9.5." in images
    assert (
        "Heat map: Each layer alone (error by what the teacher's layer adds), 3 layers at 2 steps; at the end layer 0 "
        "is furthest off." in images
    )
    mmlu = next(alt for alt in images if alt.startswith("MMLU"))
    assert mmlu.endswith("between 0.3 and 0.3; full hybrid_ft 0.5000 at step 10.")


def test_there_is_a_file_of_every_chart(one):
    run, page = one
    pictures = {file.name for file in page.parent.iterdir()} - {"index.html"}
    assert pictures == {f"index-{key}.png" for key in keys(run)}
    assert all(matplotlib.image.imread(page.parent / name).std() > 0 for name in pictures)


def test_what_comes_from_a_run_is_escaped_and_nothing_is_loaded(one, two):
    for page in (one[1], two[1]):
        text = page.read_text()
        parsed = Parsed(text)
        assert NASTY not in text and NASTY in "".join(parsed.texts["td"] + parsed.texts["figcaption"])
        assert {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "object", "a", "base"} == set()
        assert all(not name.startswith("on") for _, attributes in parsed.tags for name in attributes)
        policy = {a.get("http-equiv"): a.get("content") for tag, a in parsed.tags if tag == "meta"}
        assert policy["Content-Security-Policy"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        for part in [text, *(svg.decode() for svg in parsed.images().values())]:
            names = re.sub(
                r'<!DOCTYPE svg[^>]*>|xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>', "", part, flags=re.DOTALL
            )
            assert not re.search(r"https?:|url\((?!#)|@import|href=\"(?!#|data:)|src=\"(?!data:)", names)


def test_a_name_that_is_a_script_is_text(tmp_path):
    run = read_run(
        build(tmp_path / "<img src=x onerror=alert(1)> & \"co'", [row_of(1)]), "<img src=x onerror=alert(1)>"
    )
    parsed = Parsed(make_page([run, run], [], []))
    assert "img" not in [tag for tag, _ in parsed.tags]
    assert parsed.texts["title"] == ["<img src=x onerror=alert(1)> · <img src=x onerror=alert(1)>"]


def test_several_runs_share_their_charts(two):
    parsed = Parsed(two[1].read_text())
    assert parsed.texts["h1"] == ["2 runs"]
    assert {"a/full ", "b/full "} <= set(parsed.texts["span"]) and "not recorded" in parsed.texts["span"]
    strokes = [attributes["stroke"] for tag, attributes in parsed.tags if tag == "line"]
    assert strokes == [colour_of(0), colour_of(1)]
    loss = next(svg.decode() for alt, svg in parsed.images().items() if alt.startswith("Loss"))
    assert all(f"stroke: {colour}" in loss for colour in strokes)
    assert parsed.texts["h3"][0] == "Where the runs differ"
    assert "b/full from 9.75 to 7.75" in next(alt for alt in parsed.images() if alt.startswith("Loss"))
    assert [tag["class"] for _, tag in parsed.tags if "charts" in tag.get("class", "")].count("charts pairs") == 1
    assert "both-loss.png" in os.listdir(two[1].parent)


def test_a_run_of_one_row_and_nothing_else_has_a_page(tmp_path):
    run = build(tmp_path / "run", [row_of(1)], '{"step', status={"status": "running", "launched": 0.0})
    parsed = Parsed(write_report([run], None).read_text())
    assert parsed.texts["p"][1:] == [
        "run: has not told that it ended: it is going on, or has died.",
        "run: the last line of metrics.jsonl is cut short, as a crash leaves it, and left out.",
        "Not recorded: there is no args.yaml, and no checkpoint.",
    ]
    assert "1970-01-01 00:00 UTC" in parsed.texts["dd"]
    assert parsed.texts["h2"] == ["Summary", "Training", "Speed and memory", "Options"]


def test_a_second_call_writes_the_same_and_leaves_the_rest_alone(tmp_path):
    rows = [{"step": step, "loss": float(step), "layer_map": {"own": [0.1, 0.2]}} for step in (1, 2)]
    run = build(tmp_path / "run", rows)
    page = write_report([run], None)
    (page.parent / "own-notes.txt").write_text("kept")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert write_report([run], None) == page and len(before) == 6
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_the_page_of_a_long_run_stays_small(tmp_path):
    noise = np.random.default_rng(0).normal(size=(30_000, 2)).tolist()
    rows = [{"step": i + 1, "loss": a, "grad_norm": math.exp(b)} for i, (a, b) in enumerate(noise)]
    page = write_report([build(tmp_path / "run", rows)], None)
    assert page.stat().st_size < 150_000
    assert "running medians of 601 steps" in page.read_text()


# The command


def run_report(monkeypatch, *argv) -> int:
    monkeypatch.setattr("sys.argv", ["report.py", *map(str, argv)])
    return run_entry(report.main)


def test_the_command_tells_where_the_page_is(tmp_path, monkeypatch, capsys):
    for name in "ab":
        build(tmp_path / name, [row_of(1, **dict.fromkeys(("ce", "kl", "lr", "grad_norm", "tokens_per_s")))])
    assert run_report(monkeypatch, tmp_path / "a", tmp_path / "b") == 0
    page = tmp_path / "a" / "report" / "comparison" / "index.html"
    assert capsys.readouterr().out == f"{page}\n" and page.is_file()


@pytest.mark.parametrize(
    "make,told",
    [
        (lambda folder: None, "no such directory; expected the --output_dir of a run of train_gpus.py"),
        (lambda folder: folder.mkdir(), "no metrics.jsonl in it; expected the --output_dir of a run of train_gpus.py"),
        (lambda folder: build(folder, []), "metrics.jsonl has no row yet; come back after the first optimizer step"),
        (
            lambda folder: build(folder, [], '{"st'),
            "metrics.jsonl has no row yet; come back after the first optimizer step",
        ),
    ],
)
def test_what_is_no_run_directory_is_told_in_one_line(tmp_path, monkeypatch, capsys, make, told):
    make(tmp_path / "run")
    assert run_report(monkeypatch, tmp_path / "run") == 2
    assert capsys.readouterr().err == f"error: RUN_DIR {tmp_path / 'run'}: {told}\n"


def test_an_output_that_is_no_page_is_not_overwritten(tmp_path, monkeypatch, capsys):
    run = build(tmp_path / "run", [row_of(1)])
    before = (run / "metrics.jsonl").read_bytes()
    assert run_report(monkeypatch, run, "--output", run / "metrics.jsonl") == 2
    assert "expected an HTML file; name one that ends in .html" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


def test_an_output_that_cannot_be_written_is_told(tmp_path, monkeypatch, capsys):
    run = build(tmp_path / "run", [{"step": 1}])
    assert run_report(monkeypatch, run, "--output", run / "status.json" / "x.html") == 2
    assert f"--output {run / 'status.json' / 'x.html'}: cannot be written" in capsys.readouterr().err


# A browser


def browse(folder: Path, page: Path, *options: str) -> str:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={folder}", "--hide-scrollbars", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_a_browser_shows_the_page(two, tmp_path):
    document = browse(tmp_path / "profile", two[1], "--dump-dom")
    parsed = Parsed(document)
    assert parsed.texts["title"] == ["a/full · b/full"] and "hit" not in parsed.texts["title"]
    assert NASTY not in document and "0.2500 ± 0.0100" in parsed.texts["td"] and len(parsed.images()) == 20
    for scheme, back in (("1", 1.0), ("0", 0.05)):
        shot = tmp_path / f"{scheme}.png"
        sized = [f"--screenshot={shot}", "--window-size=1200,2400", f"--blink-settings=preferredColorScheme={scheme}"]
        browse(tmp_path / "profile", two[1], *sized)
        picture = matplotlib.image.imread(shot)[:, :, :3]
        assert picture[0, 0].mean() == pytest.approx(back, abs=0.02)
        for colour in (colour_of(0), colour_of(1)):  # lines of both runs in the charts, below the legend
            wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
            assert (np.abs(picture[700:] - wanted).max(axis=2) < 0.05).sum() > 500
