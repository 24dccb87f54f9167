"""Runs by either exchange of gradients, on real ranks: the same losses, exact resuming, and checkpoints that both
read.
"""

import shutil

import pytest
import torch

from tests import fresh
from tests.faults.scenarios import spoil_loss
from tests.small_runs import keep_final_weights, make_models, options, read_metrics
from tests.tiny import tiny_student

SHORT = dict(max_steps=6, grad_accumulation_steps=2, save_interval=6, warmup_ratio=0.0, health_interval=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = make_models(tmp_path_factory.mktemp("models"))
    tiny_student(vocab_size=1024, tie_embeddings=True).save_pretrained(folder / "tied")
    return folder


def train(models, folder, n_ranks=2, **changes):
    argv = options(models, folder, **{**SHORT, **changes})
    codes, log = fresh.ranks(argv, n_ranks, arm=keep_final_weights)
    assert codes == [0] * n_ranks, log[-4000:]
    return read_metrics(folder)


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """Returns a function that trains once for each set of options and returns the output directory."""
    done = {}

    def run_once(exchange, **changes):
        key = (exchange, *sorted(changes.items()))
        if key not in done:
            done[key] = tmp_path_factory.mktemp("run") / "out"
            train(models, done[key], gradient_exchange=exchange, **changes)
        return done[key]

    return run_once


def weights(folder, rank=0):
    return torch.load(folder / f"rank-{rank}.pt")


def figures(folder):
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(folder)]


CASES = {
    "float32": dict(dtype="float32"),
    "frozen": dict(dtype="float32", freeze_mlp=True, freeze_replaced_layers=True),
    "bfloat16": dict(dtype="bfloat16"),
    "float16": dict(dtype="float16"),
    "align": dict(dtype="float32", stage="align", student_model="plain"),
    "tied": dict(dtype="float32", student_model="tied"),
    "clipped, with layer maps": dict(dtype="float32", grad_clip=0.05, layer_map_interval=3),
}


def changes_of(case, models):
    changes = CASES[case]
    return {**changes, **({"student_model": models / changes["student_model"]} if "student_model" in changes else {})}


@pytest.mark.parametrize("case", CASES)
def test_both_exchanges_train_alike(run, models, case):
    """Rank by rank the same weights; the other exchange's within rounding."""
    changes = changes_of(case, models)
    other, ours = run("allreduce", **changes), run("owners", **changes)
    tolerance = 1e-4 if changes["dtype"] == "float32" else 0.03
    for one, two in zip(figures(ours), figures(other), strict=True):
        assert one == pytest.approx(two, rel=tolerance)
    here, there = weights(ours), weights(ours, 1)
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_layer_maps_are_the_same(run, models):
    maps = []
    for exchange in ("allreduce", "owners"):
        rows = read_metrics(run(exchange, **changes_of("clipped, with layer maps", models)))
        maps.append([row["layer_map"]["stream"] for row in rows if "layer_map" in row])
    assert len(maps[0]) == len(maps[1]) == 2
    for one, other in zip(*maps, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def spoil_on_rank_1(rank):
    keep_final_weights(rank)
    if rank == 1:
        spoil_loss(4, 4, float("nan"))


@pytest.mark.parametrize("exchange", ["allreduce", "owners"])
def test_all_ranks_skip_what_is_not_finite_on_one(models, tmp_path, exchange):
    argv = options(models, tmp_path / "out", **SHORT, gradient_exchange=exchange, student_model=models / "plain")
    codes, log = fresh.ranks(argv, 2, arm=spoil_on_rank_1)
    assert codes == [0, 0], log[-4000:]
    assert [row["skipped_updates"] for row in read_metrics(tmp_path / "out")][-1] == 1
    here, there = weights(tmp_path / "out"), weights(tmp_path / "out", 1)
    assert all(torch.equal(here[name], there[name]) and torch.isfinite(here[name]).all() for name in here)


@pytest.mark.parametrize("bits", [8, 4])
def test_fewer_bits_hardly_change_the_losses(run, bits):
    exact, rounded = (figures(run("owners", dtype="bfloat16", **more)) for more in ({}, {"gradient_bits": bits}))
    assert exact != rounded
    for (one, _), (other, _) in zip(rounded, exact, strict=True):
        assert one == pytest.approx(other, rel=0.01)


@pytest.mark.parametrize("case", ["bfloat16", "bfloat16, saved in the foreground", "align"])
def test_a_resumed_run_is_the_run(run, models, tmp_path, case):
    case, *foreground = case.split(", ")
    changes = {**changes_of(case, models), **({"no_background_save": True} if foreground else {})}
    whole = run("owners", **changes)
    shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-12", "latest"))
    train(models, tmp_path / "out", gradient_exchange="owners", resume="auto", **changes)
    assert figures(tmp_path / "out") == figures(whole)
    resumed, expected = weights(tmp_path / "out"), weights(whole)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    health = [[row.get("update_health") for row in read_metrics(folder)] for folder in (tmp_path / "out", whole)]
    assert health[0] == health[1] and health[1][2]


EITHER = [("allreduce", "owners", 2), ("owners", "allreduce", 2), ("owners", "owners", 1), ("allreduce", "owners", 1)]


@pytest.mark.parametrize("before,after,n_ranks", EITHER)
def test_either_resumes_a_checkpoint_of_the_other_and_of_other_ranks(run, models, tmp_path, before, after, n_ranks):
    """The steps after resuming have the losses of the run that was not stopped: moments are those of before."""
    whole = run(before, **CASES["float32"], student_model=models / "plain")
    shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-12", "latest"))
    batch_size = 4 // n_ranks
    train(
        models,
        tmp_path / "out",
        n_ranks,
        gradient_exchange=after,
        resume="auto",
        student_model=models / "plain",
        batch_size=batch_size,
        dtype="float32",
    )
    for one, two in zip(figures(tmp_path / "out"), figures(whole), strict=True):
        assert one == pytest.approx(two, rel=1e-3)
