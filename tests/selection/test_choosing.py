"""A whole choice on tiny models, against all sets; and how one that was stopped resumes."""

import itertools
import json
import math

import pytest

from selection.ablation import Ablations, mean_growth
from selection.choosing import Request, choose_heads, evenly
from selection.cost import choice_cost
from selection.greedy import Objective
from selection.hidden_states import HiddenStates
from selection.material import Material
from selection.swaps import Swaps
from tests.selection.one_rank import RANK, choice, material, models


@pytest.fixture(scope="module")
def found():
    return choice()


def test_the_sets_have_their_figures_and_the_best_is_chosen(found):
    texts = material()
    swaps = Swaps(*models(), texts.windows[:4], [texts.probes[0].part(range(4))])
    objective = Objective(swaps.teacher_figures, 0.3)
    values = {
        some: objective(swaps.figures(frozenset(range(4)) - set(some)))
        for n in range(5)
        for some in itertools.combinations(range(4), n)
    }
    for row in found["sets"]:
        assert row["value"] == pytest.approx(values[tuple(row["kept"])])
    of_budget = {tuple(row["kept"]): row["value"] for row in found["sets"] if len(row["kept"]) == 2}
    assert tuple(found["layers"]) == min(of_budget, key=lambda kept: of_budget[kept])
    assert [len(row["kept"]) for row in found["sets"]] == [0, 1, 2, 4, 3, 2, 2, 2]  # keep, recur, ranking, evenly
    for row in found["swaps"]:
        assert row["value"] == pytest.approx(values[tuple(set(range(4)) - {row["layer"]})])
    assert found["sets"][1]["value"] == min(value for kept, value in values.items() if len(kept) == 1)


def test_the_last_figures_are_of_texts_that_nothing_was_chosen_on(found):
    texts = material()
    swaps = Swaps(*models(), texts.windows[4:], [texts.probes[0].part(range(4, 6))])
    for row in found["aside"]["sets"]:
        figures = swaps.figures(frozenset(range(4)) - set(row["kept"]))
        assert row["kl"]["mean"] == pytest.approx(sum(figures.kl) / 2) and row["kl"]["n"] == 2
        assert row["probes"]["copying"]["loss"]["mean"] == pytest.approx(sum(figures.probes["copying"].loss) / 2)
    assert {row["by"] for row in found["aside"]["sets"]} == {"keep", "recur", "ranking", "evenly"}


def test_heads_and_layers_are_ablated(found):
    ablations = Ablations(models()[0], [material().probes[0].part(range(4))])
    own = ablations.teacher_scores
    assert [row["place"] for row in found["ablation"]["layers"]] == [[0], [1], [2], [3]]
    assert len(found["ablation"]["heads"]) == 16
    head = found["ablation"]["heads"][9]
    assert head["place"] == [2, 1] and head["score"] == pytest.approx(mean_growth(ablations.without(2, [1]), own))
    assert head["probes"]["copying"]["growth"]["half"] > 0 and head["probes"]["copying"]["growth"]["n"] == 4


def test_what_no_measured_set_of_the_size_beats_is_shown(found):
    points = [(row["kl"]["mean"], row["growth"]) for row in found["pareto"]]
    assert points == sorted(points) and [b for _, b in points] == sorted((b for _, b in points), reverse=True)
    assert all(len(row["kept"]) == 2 for row in found["pareto"])


def test_a_probe_that_the_teacher_cannot_do_is_left_out_and_named(caplog):
    texts = material()
    able = texts.probes[0]
    hard = type(able)("hard", able.ids, able.answer, able.text, 0.9)
    found = choice(texts=Material(texts.windows, [hard], {"other": "too long"}))
    assert list(found["left_out"]) == ["other", "hard"] and found["ablation"] is None
    assert "1.10 are needed (chance 0.90)" in found["left_out"]["hard"]
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 3 and "the probe other is left out: too long" in warned
    assert warned[2] == "no probe could be used: layers are chosen by the KL alone, which hardly sees copying"
    assert all(row["value"] == row["kl"]["mean"] and row["probes"] == {} for row in found["sets"])


def test_probes_of_no_weight_are_shown_and_change_nothing():
    found = choice(weight=0.0, ablates=False)
    assert found["ablation"] is None
    assert all(row["value"] == row["kl"]["mean"] and row["probes"] for row in found["sets"])


@pytest.mark.parametrize("n_rows", [0, 3, 22, 30])
def test_a_stopped_choice_resumes_to_the_same(found, tmp_path, n_rows, monkeypatch):
    file = tmp_path / "measured.jsonl"
    assert choice(file) == found
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:n_rows]) + lines[n_rows][:7])  # killed while it was writing
    measured = []
    figures, without = Swaps.figures, Ablations.without
    monkeypatch.setattr(Swaps, "figures", lambda self, one: measured.append(one) or figures(self, one))
    monkeypatch.setattr(Ablations, "without", lambda self, *one: measured.append(one) or without(self, *one))
    assert choice(file) == found
    assert file.read_bytes() == whole and len(measured) == len(lines) - n_rows
    assert len({json.loads(line)["name"] for line in lines}) == len(lines)


def test_another_budget_uses_what_was_measured(tmp_path):
    file = tmp_path / "measured.jsonl"
    choice(file, n_kept=2)
    n_rows = len(file.read_bytes().splitlines())
    assert choice(file, n_kept=3) == choice(n_kept=3)
    assert 0 < len(file.read_bytes().splitlines()) - n_rows < 8


def test_figures_that_are_not_finite_are_one_line(monkeypatch):
    monkeypatch.setattr(Swaps, "_kl", lambda *_: math.nan)
    with pytest.raises(ValueError, match=r"'choosing 0' of measured.jsonl are not finite; use --dtype float32"):
        choice()


def test_a_teacher_whose_figures_are_not_finite_is_no_reference(monkeypatch):
    """Nothing is larger than NaN: each hybrid would seem to do the probes as well."""
    init = Swaps.__init__

    def broken(self, *args):
        init(self, *args)
        self.teacher_figures.probes["copying"].loss[0] = math.nan

    monkeypatch.setattr(Swaps, "__init__", broken)
    with pytest.raises(ValueError, match="the figures of the teacher are not finite; use --dtype float32"):
        choice()


@pytest.mark.parametrize(
    "n_layers,n_kept,kept", [(4, 1, {2}), (6, 3, {1, 3, 5}), (5, 5, set(range(5))), (30, 2, {7, 22})]
)
def test_equal_distances(n_layers, n_kept, kept):
    assert set(range(n_layers)) - evenly(n_layers, n_kept) == kept


@pytest.mark.parametrize("n_kept,n_heads", [(0, 0), (0, 4), (2, 0), (2, 4)])
def test_what_was_run_is_what_the_plan_says(monkeypatch, n_kept, n_heads):
    """To a fifth: which layers a round measures decides where its sets start."""
    texts, all_states = material(), []
    init = HiddenStates.__init__

    def remembered(self, *args):
        all_states.append(self)
        self.tokens_run = 0
        init(self, *args)

    monkeypatch.setattr(HiddenStates, "__init__", remembered)
    teacher, student = models()
    if n_kept:
        choice(n_kept=n_kept, n_heads=n_heads)
    else:
        choose_heads(teacher, Request(texts, 0, 0.3, n_heads=n_heads, searches_heads=True), RANK)
    cost = choice_cost(
        (teacher.config, student.config),
        (n_kept, n_heads),
        (texts.windows[:, 1:].numel(), texts.probes[0].ids.numel()),
        True,
        1,
        "float32",
    )
    assert sum(states.tokens_run for states in all_states) / 4 == pytest.approx(cost.tokens, rel=0.2)
