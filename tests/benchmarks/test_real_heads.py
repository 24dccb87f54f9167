"""real_heads.py: which heads are the strongest, and a trial on the tiny preset with its training."""

from pathlib import Path

import pytest

from benchmarks import real_heads
from benchmarks.real_heads import main, strongest

HOW = (", the teacher's others short-sighted", " cut out", " fitted beside", ", trained")
TINY = Path(__file__).parents[2] / "presets" / "tiny"


def test_the_strongest_heads_and_groups():
    scores = [[0.1, 0.2, 0.9, 0.0], [0.5, 0.45, 0.3, 0.0]]
    assert strongest(scores, 3, 1) == {0: [2], 1: [0, 1]}
    assert strongest(scores, 1, 2) == {1: [0, 1]}
    assert strongest(scores, 2, 2) == {0: [2, 3], 1: [0, 1]}


@pytest.mark.bench
def test_a_trial(tmp_path, monkeypatch):
    monkeypatch.setattr(real_heads, "PRESET", "tiny")
    line = f"--teacher {TINY}/teacher --student {TINY}/student --text {TINY}/text --output {tmp_path} --probe_texts 3"
    argv = [*line.split(), *["--far", "2", "--heads", "2", "--layers", "0", "--align", "16", "--distil", "16"]]
    rows = main(argv)
    assert [row["case"] for row in rows] == [
        "the teacher",
        "no heads",
        *(f"2 {what}{how}" for what in ("far", "heads") for how in HOW),
        "1 layers",
        "1 layers, trained",
    ]
    assert [row["key/value heads"] for row in rows[2:6]] == [2] * 4  # with all their query heads
    assert rows[0]["kl"] < 1e-5 and all(row.get("kl", 1) > 0.01 for row in rows[1:])
    assert main(argv) == rows  # of what was made
