"""The benchmark of conversions in its tiny form: every way of making mixers has its figures, and the closed form beats
mixers that give zeros.
"""

import json

import pytest

from benchmarks.bench_conversion import main, recurrent_layers

KL = ("kl_4", "kl_half", "kl_all")


@pytest.mark.bench
def test_the_closed_form_beats_mixers_of_zeros(tmp_path, capsys):
    rows = {row["mixers"]: row for row in main(["--quick", "--json", str(tmp_path / "rows.json")])}
    assert list(rows) == ["zero", "random", "projections", "closed form", "closed form, no biases"]
    for name in ("closed form", "closed form, no biases"):
        assert rows[name]["error"] < 0.9
        assert all(rows[name][column] < rows["zero"][column] for column in KL)
    assert rows["projections"]["error"] > 1
    assert json.loads((tmp_path / "rows.json").read_text()) == list(rows.values())
    assert "| closed form |" in capsys.readouterr().out


def test_the_sets_of_thirty_layers_are_those_of_the_study():
    sets = recurrent_layers(30)
    assert sets["4"] == [8, 14, 20, 26] and sets["half"] == list(range(1, 30, 2)) and len(sets["all"]) == 30
    assert all(recurrent_layers(n)["4"] for n in range(1, 40))
