"""real_choice.py: what random sets are, how they are compared, and a trial on the tiny preset."""

from pathlib import Path

import pytest

from benchmarks.real_choice import main, named_sets, of_random

TINY = Path(__file__).parents[2] / "presets" / "tiny"


def test_all_sets_have_the_size_of_the_choice():
    found = {"n_layers": 6, "layers": [0, 3], "sets": [{"by": "keep", "kept": [0]}, {"by": "evenly", "kept": [1, 4]}]}
    sets = named_sets(found, 5)
    assert sets["chosen"] == {1, 2, 4, 5} and sets["evenly"] == {0, 2, 3, 5} and "keep" not in sets
    assert len(sets) == 7 and all(len(one) == 4 for one in sets.values())
    assert sets == named_sets(found, 5)


def test_less_kl_and_more_right_answers_are_better():
    drawn = [{"case": "", "kl": kl, "+-": 0.1, "copying": acc} for kl, acc in ((0.3, 0.1), (0.1, 0.2), (0.2, 0.4))]
    best, median, better = of_random(8, drawn, {"case": "", "kl": 0.2, "+-": 0.1, "copying": 0.2})
    assert (best["kl"], best["copying"]) == (0.1, 0.4)
    assert (median["kl"], median["copying"]) == (0.2, 0.2)
    assert (better["kl"], better["copying"]) == (1, 1)


@pytest.mark.bench
def test_a_trial(tmp_path):
    paths = {"teacher": TINY / "teacher", "student": TINY / "student", "text": TINY / "text" / "heldout.jsonl"}
    argv = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    argv += ["--output", str(tmp_path), "--recurrent", "3", "--random", "2", "--windows", "3"]
    rows = main(argv)
    assert rows[0]["kl"] == 0 and all(row["kl"] > 0 for row in rows[1:6])
    assert main(argv) == rows  # of what was measured
