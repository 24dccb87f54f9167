"""The benchmark of choices in its small form: what is planted is found, all sets have their figures, and those chosen
are among the best of what they were chosen by.
"""

import json

import pytest

from benchmarks.bench_choice import main, ranks_of


@pytest.mark.bench
def test_what_is_planted_is_found_and_what_is_chosen_is_good(tmp_path, capsys):
    rows = {row["case"]: row for row in main(["--quick", "--json", str(tmp_path / "rows.json")])}
    planted = [row for case, row in rows.items() if case.startswith("planted")]
    assert [(row["layers found"], row["heads found"]) for row in planted] == [("2 of 2", "2 of 2")] * 2
    assert sum(case.startswith("tiny, keeps ") for case in rows) == 20
    chosen = {case.rpartition(" by ")[2]: row for case, row in rows.items() if case.startswith("ranks of ")}
    assert chosen["KL alone"]["kl"] <= 2
    assert set(chosen) == {"KL alone", "KL and questions"}
    assert json.loads((tmp_path / "rows.json").read_text()) == list(rows.values())
    assert "| tiny, keeps 1 2 3 |" in capsys.readouterr().out


def test_the_best_has_rank_1_in_every_column():
    rows = {(0,): {"case": "a", "kl": 1.0, "acc": 0.2}, (1,): {"case": "b", "kl": 2.0, "acc": 0.9}}
    rows[(2,)] = {"case": "c", "kl": 2.0, "acc": 0.9}
    assert ranks_of("KL", (0,), rows) == {"case": "ranks of 0, chosen by KL", "kl": 1, "acc": 3}
    assert ranks_of("KL", (2,), rows) == {"case": "ranks of 2, chosen by KL", "kl": 2, "acc": 1}
