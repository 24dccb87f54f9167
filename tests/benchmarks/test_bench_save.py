"""bench_save.py at its smallest, from end to end."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.bench
def test_quick_mode_measures_both_ways_to_save(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_save.py"), "--quick", "--json", str(tmp_path / "rows")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "in the background" in done.stdout and "in the foreground" in done.stdout
    assert (tmp_path / "rows").exists()
