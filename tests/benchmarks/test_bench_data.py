"""benchmarks/bench_data.py: its trial run from end to end, and the checks that its candidates do the same work."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = pytest.mark.bench
ROOT = Path(__file__).parents[2]
BENCHMARK = ROOT / "benchmarks" / "bench_data.py"


def test_trial_run(tmp_path):
    command = [sys.executable, str(BENCHMARK), "--quick", "--json", str(tmp_path / "data.json")]
    run = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads((tmp_path / "data.json").read_text())
    packing, loading = [row for row in rows if "threads" in row["case"]], [row for row in rows if "step" in row["case"]]
    assert len(packing) + len(loading) == len(rows)
    for case in {row["case"] for row in packing}:
        by_name = {row["candidate"]: row for row in packing if row["case"] == case}
        assert {"encode_batch_fast", "ours", "ours, from jsonl", "per-document loop"} <= set(by_name)
        assert {"datasets.map, 1 process", "datasets.map, 2 processes"} <= set(by_name)
        bare = by_name["encode_batch_fast"]
        for row in by_name.values():
            assert row["ratio_to_baseline"] == row["seconds"] / bare["seconds"]
            assert row["tokens_per_s"] == pytest.approx(bare["tokens_per_s"] / row["ratio_to_baseline"])
    by_name = {row["candidate"]: row for row in loading}
    assert by_name["step"]["ratio_to_baseline"] == 1
    for name in ("cached, 0 workers", "cached, 2 workers", "DataLoader", "stream", "stream, not ahead"):
        assert by_name[name]["batches_per_s"] > 0
        assert 0 < by_name[name]["seconds"] <= by_name[name]["longest_wait_s"]
    assert "tokenizer: " in run.stdout


def test_windows_are_compared():
    from bench_data import check_windows
    from data_candidates import SEQ_LEN

    size = SEQ_LEN + 1
    expected = np.arange(20 * size + 7)
    windows = expected[: 20 * size].reshape(20, size)
    check_windows("whole", windows, expected, most_missing=0)
    check_windows("without the end of a group", windows[:-1], expected, most_missing=1)
    for wrong in (windows[:-2], windows[1:], windows + 1, np.concatenate([windows, windows])):
        with pytest.raises(ValueError, match="a candidate has not stored the windows"):
            check_windows("a candidate", wrong, expected, most_missing=1)


def test_documents_are_as_long_and_as_many_as_asked():
    from data_candidates import make_documents

    documents = make_documents(megabytes=4, characters=5000)
    assert all(5000 <= len(document) + 2 < 20_000 for document in documents)
    assert sum(map(len, documents)) + 2 * len(documents) >= 4e6


def test_waits_are_those_for_batches_alone(monkeypatch):
    import bench_data

    now = 0.0

    def sleep(seconds):
        nonlocal now
        now += seconds

    def batches():
        for wait in (9.0, 1.0, 2.0, 6.0):  # the first is part of the start
            sleep(wait)
            yield "a batch"

    monkeypatch.setattr(bench_data, "time", SimpleNamespace(sleep=sleep, perf_counter=lambda: now))
    assert bench_data.time_waits(batches(), steps=4, step_s=50.0) == {"seconds": 3.0, "longest_wait_s": 6.0}
