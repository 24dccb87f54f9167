"""What is read of a run directory, whole or damaged."""

import json
import math
from pathlib import Path

import numpy as np

from report import write_page
from report_page.page import make_page
from report_page.run_data import distinct_names, read_options, read_run, read_runs, read_scores, read_warnings
from report_page.tables import facts_of, measure_table, scores_of_runs, warning_table
from tests.report_page.run_folders import NASTY, build, full_run, result, row_of


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
        "copying": {"words": 120, "acc": 0.25, "n": 400},
        "tasks": {"arc": {"results": {"arc_easy": figures, "bad": 3, "none": {}}}, "broken": []},
    }
    damaged = {
        "held_out": [],
        "retrieval": {},
        "copying": [3],
        "tasks": {"arc": {"results": None}},
        "config": {"which": "student"},
    }
    config = {"which": "hybrid_ft", "ckpt": "/x/run/checkpoint-2"}
    run = build(tmp_path / "run", [row_of(1)], beyond={**found, "config": config}, damaged=damaged)
    assert scores_of_runs(read_runs([run])) == []
    assert measure_table(read_runs([run])) == [
        ["model", "measure", "value", "step", "file"],
        ["hybrid_ft", "held-out perplexity", "20.0000", "1", "beyond.json"],
        ["hybrid_ft", "held-out KL", "0.5000", "1", "beyond.json"],
        ["hybrid_ft", "retrieval, 64 tokens, 4 pairs", "0.5000", "1", "beyond.json"],
        ["hybrid_ft", "copying, 120 words", "0.2500", "1", "beyond.json"],
        ["hybrid_ft", "arc_easy, acc", "0.6000", "1", "beyond.json"],
    ]
    assert "<td>held-out KL</td>" in make_page(read_runs([run]), [], [])


def test_what_ends_a_document_is_part_of_a_measures_name(tmp_path):
    config = {"which": "teacher", "document_separator": "<|end_of_text|>"}
    run = build(tmp_path / "run", [row_of(1)], eval={"held_out": {"kl": 0.5}, "config": config})
    ((_, name, *_),) = measure_table(read_runs([run]))[1:]
    assert name == "held-out KL, documents end with <|end_of_text|>"


def test_numbers_too_large_for_a_float_are_left_out(tmp_path):
    rows = [row_of(1), row_of(2, loss=10**400, eval={"ce": 10**400}, layer_map={"own": [10**400, 1.0]})]
    run = build(tmp_path / "run", rows, json.dumps({"step": 10**400}) + "\n", score=result("student", 10**400))
    (run / "status.json").write_text(json.dumps({"status": "running", "launched": 1e20}))
    warned = [{"time": time, "rank": 0, "text": "warned"} for time in (1e300, 10**400)]
    (run / "warnings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in warned))
    (found,) = read_runs([run])
    assert np.isnan(found.columns["loss"]).tolist() == [False, True] and found.damaged == 1 and found.scores == []
    assert "Started" not in facts_of(found) and warning_table([found])[1][3:] == ["–", "–"]
    assert write_page([run], None).is_file()


def test_names_are_made_distinct_by_as_few_parents_as_possible():
    assert distinct_names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert distinct_names([Path("/a/b/x"), Path("/c/b/x")]) == ["a/b/x", "c/b/x"]


def test_a_directory_that_is_named_twice_is_one_run(tmp_path):
    build(tmp_path / "run", [row_of(1)])
    (tmp_path / "link").symlink_to("run")
    assert [run.name for run in read_runs([tmp_path / "run", tmp_path / "link"])] == ["run"]
