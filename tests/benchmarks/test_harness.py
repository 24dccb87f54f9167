"""The harness of the benchmarks, on candidates whose cost is known."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
TOY = """
import resource, sys
import harness, torch

def run(case, candidate):
    if candidate == "elsewhere":
        harness.need("a_package_that_is_nowhere")
    if candidate == "broken":
        raise ValueError("out of order")
    def work():
        pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(int(candidate) * 250_000)
        return {"faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages}
    return harness.measure(work)
"""


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import harness

    return harness


@pytest.fixture
def toy(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    return str(script)


@pytest.mark.bench
def test_peaks_and_notes_of_real_children(harness, toy):
    rows = harness.run_rounds(toy, {"MB": ["100", "50", "elsewhere"]}, 1, "100")
    assert [row["candidate"] for row in rows] == ["100", "50", "elsewhere"]
    for row in rows[:2]:
        assert row["peak_bytes"] == pytest.approx(1e6 * int(row["candidate"]), rel=0.1)
        assert row["seconds"] > 0 and row["default_seconds"] > 0
    assert rows[1]["peak_ratio"] == pytest.approx(0.5, rel=0.1)
    assert rows[2]["note"] == "not installed: a_package_that_is_nowhere"
    assert rows[2]["seconds"] is rows[2]["peak_bytes"] is rows[2]["ratio_to_baseline"] is None


@pytest.mark.bench
def test_the_caching_allocator_keeps_what_is_freed(harness, toy):
    """50 MB are 12 thousand pages of 4 KiB: after the first run the process requests no more."""
    result = harness.run_child(toy, "run", "case", "50", environment=harness.CACHING)
    assert result["faults"] < 1000
    assert result["peak_bytes"] < 5e6


def test_a_child_that_fails_is_an_error_that_says_why(harness, toy):
    with pytest.raises(RuntimeError, match="out of order"):
        harness.run_child(toy, "run", "case", "broken")


def test_medians_ratios_and_the_order_of_runs(harness, monkeypatch):
    order, times = [], {"a": iter([2.0, 9.0, 4.0]), "b": iter([1.0, 1.0, 7.0])}

    def run_child(script, function, case, candidate, *extra, environment):
        caching = environment == harness.CACHING
        order.append((candidate, caching))
        seconds = next(times[candidate]) if caching else 10.0
        return {"seconds": seconds, "peak_bytes": 0 if caching else 100 * len(candidate), "extra": extra}

    monkeypatch.setattr(harness, "run_child", run_child)
    monkeypatch.setattr(harness.torch.cuda, "is_available", lambda: False)
    a, b = harness.run_rounds("script", {"case": ["a", "b"]}, 3, "a", "more")
    assert order == [("a", True), ("a", False), ("b", True), ("b", False)] * 3
    assert (a["seconds"], b["seconds"]) == (4.0, 1.0)
    assert (a["ratio_to_baseline"], b["ratio_to_baseline"]) == (1.0, 0.25)
    assert a["default_seconds"] == 10.0 and a["peak_bytes"] == 100 and a["extra"] == ("more",)


def test_rows_are_written_and_shown(harness, tmp_path, capsys):
    rows = [
        {"case": "c", "candidate": "a", "seconds": 1.23456, "peak_bytes": 2_000_000},
        {"case": "c", "candidate": "b", "seconds": None, "peak_bytes": None, "note": "not installed: b"},
    ]
    harness.report(rows, tmp_path / "new" / "rows.json")
    assert json.loads((tmp_path / "new" / "rows.json").read_text()) == rows
    machine, *table = capsys.readouterr().out.splitlines()
    assert "torch" in machine and "cores" in machine
    assert table == [
        "| case | candidate | seconds | peak_MB | note |",
        "| --- | --- | --- | --- | --- |",
        "| c | a | 1.23 | 2 | - |",
        "| c | b | - | - | not installed: b |",
    ]


@pytest.fixture
def parse(harness, monkeypatch):
    def parse_options(*words, quick_cases=(), quick_candidates=()):
        monkeypatch.setattr(sys, "argv", ["bench.py", *words])
        names = ["S=8 B=1", "S=8 B=2", "S=16 B=1"], ["plain", "ours", "ours, ahead"], ["plain"]
        options = harness.parse_options("about it", *names, quick_cases, quick_candidates)
        return options.cases, options.candidates, options.rounds

    return parse_options


def test_cases_are_chosen_by_parts_and_candidates_by_names(parse):
    every_case, every_candidate = ["S=8 B=1", "S=8 B=2", "S=16 B=1"], ["plain", "ours", "ours, ahead"]
    assert parse() == (every_case, every_candidate, 3)
    chosen = ["S=8 B=1", "S=16 B=1"], ["plain", "ours"], 7
    assert parse("--cases", "B=1", "--candidates", "ours", "--rounds", "7") == chosen
    assert parse("--quick", "--rounds", "7") == (["S=8 B=1"], every_candidate, 1)
    assert parse("--quick", "--cases", "S=16")[0] == ["S=16 B=1"]
    quick = {"quick_cases": ["S=2 B=1", "S=2 B=2"], "quick_candidates": ["ours"]}
    assert parse("--quick", **quick) == (quick["quick_cases"], ["plain", "ours"], 1)
    assert parse("--quick", "--candidates", "ours, ahead", **quick)[1] == ["plain", "ours, ahead"]
    assert parse(**quick) == parse()


@pytest.mark.parametrize(
    "words,error",
    [
        (
            ("--cases", "S=8", "S=9"),
            "--cases 'S=9': expected a part of one of these names: 'S=8 B=1', 'S=8 B=2', 'S=16 B=1'",
        ),
        (("--candidates", "our"), "--candidates 'our': expected one of these names: 'plain', 'ours', 'ours, ahead'"),
    ],
)
def test_a_value_that_matches_nothing_is_an_error(parse, words, error):
    with pytest.raises(SystemExit) as raised:
        parse(*words)
    assert raised.value.code == error


def test_make_bench_runs_every_benchmark_and_git_ignores_the_rows():
    by_hand = ["gpu", "conversion", "choice"]  # a GPU; a model and text that are made first; no time is measured
    lines = subprocess.run(["make", "--dry-run", "bench"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = lines.split("for name in ")[1].split(";")[0].split()
    assert {f"bench_{name}.py" for name in [*names, *by_hand]} == {file.name for file in BENCHMARKS.glob("bench_*.py")}
    folder = lines.split("--json ")[1].split("/")[0]
    assert f"{folder}/" in (ROOT / ".gitignore").read_text().splitlines()
