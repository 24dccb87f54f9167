"""The summary and the tables of a report."""

import json

import pytest

from report_page.run_data import read_run, read_runs
from report_page.tables import facts_of, option_tables, scores_of_runs, summary_table, warning_table
from tests.report_page.run_folders import NASTY, build, full_run, options, row_of


def test_the_summary_has_the_numbers(tmp_path):
    facts = facts_of(read_run(full_run(tmp_path), "full"))
    assert facts.pop("Last row").endswith(" UTC")
    assert facts == {
        "Ended": "complete: all",
        "Optimizer steps": "10 (--max_steps 10)",
        "Tokens": "10,000 (1,000 per step)",
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


def test_what_a_run_has_not_recorded_is_not_in_its_summary(tmp_path):
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
    assert list(tables)[0] == "Different between the runs"
    assert differing == [["option", "a", "b"], ["seed", "0", "1"]]
    assert ["max_lr", "0.01", "0.01", "0.002"] in changed and ["seed", "0", "1", "0"] in changed
    assert "dtype" not in [row[0] for row in changed] and "output_dir" not in [row[0] for row in changed]
    assert len(every) == 7


def test_options_of_an_unknown_preset_are_compared_with_the_plain_defaults(tmp_path):
    folder = build(tmp_path / "run", [row_of(1)])
    options(folder, preset="../gone", seed=0, epochs=3, news=[])
    changed = option_tables(read_runs([folder]))["Changed from the defaults and the preset"]
    assert changed[1:] == [["epochs", "3", "1"], ["news", "none", "–"], ["preset", "../gone", "llamba-8b"]]


def test_tables_name_the_run_where_there_are_several(tmp_path):
    folders = [full_run(tmp_path / "a"), build(tmp_path / "b" / "full", [row_of(step) for step in range(1, 6)])]
    alone, both = read_runs(folders[:1]), read_runs(folders)
    assert scores_of_runs(alone) == [
        ["model", "MMLU accuracy ± stderr", "questions", "step", "file"],
        ["student", "0.2500 ± 0.0100", "400", "–", "eval.json"],
        ["hybrid_ft", "0.5000 ± 0.0100", "400", "10", "eval.json"],
    ]
    assert [row[0] for row in scores_of_runs(both)] == ["run", "a/full", "a/full"]
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
