"""bench_mmlu.py at its smallest, from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.bench
def test_quick_mode_measures_both_and_finds_that_they_agree(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_mmlu.py"), "--quick", "--json", str(tmp_path / "rows")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["candidate"]: row for row in json.loads((tmp_path / "rows").read_text())}
    assert rows["ours"]["tokens"] < rows["lm-eval, batch 1"]["tokens"] < rows["lm-eval, batch 8"]["tokens"]
    agreement = done.stdout.splitlines()[-1].split(" | ")
    assert agreement[-2] == "0"  # other answers
