"""The exchange with owners on two nodes: in two levels, against one level and on real ranks."""

import itertools
import math
import os
import shutil
from unittest import mock

import pytest
import torch

from distillation.owners import Owners
from tests import fresh
from tests.distillation.few_words import Words, backward_order, groups_of, learn, weights
from tests.small_runs import keep_final_weights, make_models, options, read_metrics
from tests.two_ranks import on_ranks

SMALL = 200  # bytes of a bucket: every matrix is one of its own, and parameters are sent in several messages
FORMS = {"one level": {}, "as it is": {}, "again": {}, "small buckets": {"bucket_bytes": SMALL}, "8 bits": {}}
KINDS = list(itertools.product((torch.float32, torch.bfloat16), (False, True)))


def by_levels(ranks):
    """Returns norms and weights, by dtype, whether rows are sent, and form."""
    found = {}
    for dtype, dense in KINDS:
        for form, settings in FORMS.items():
            model = Words(dtype)
            n_local = 4 if form == "one level" else 2
            rows, bits = None if dense else model.embedding.weight, 8 if form == "8 bits" else 16
            with mock.patch("distillation.owners.local_world_size", lambda n=n_local: n):
                exchange = Owners(backward_order(model), groups_of(model), 1e-2, True, rows, bits, **settings)
            assert len(exchange.levels) == (1 if form == "one level" else 2)
            norms = learn(model, exchange, ranks.rank)
            masters = {
                (name, owned.start): kept["exp_avg"]
                for owned, kept in exchange.owned()
                for name, parameter in model.named_parameters()
                if parameter is owned.parameter
            }
            found[dtype, dense, form] = (norms, weights(model), masters)
    return found


@pytest.fixture(scope="module")
def of_four_ranks(tmp_path_factory):
    """Returns what `by_levels` found on two nodes of two ranks."""
    return on_ranks(by_levels, tmp_path_factory.mktemp("levels"), 4, ranks_per_node=2)


@pytest.mark.parametrize("dtype,dense", KINDS)
def test_no_bit_depends_on_buckets_rows_or_the_run(of_four_ranks, dtype, dense):
    norms, expected, _ = of_four_ranks[0][dtype, False, "as it is"]
    assert len(set(norms)) == 5
    for form in ("as it is", "again", "small buckets"):
        for of_rank in of_four_ranks:
            found_norms, found, _ = of_rank[dtype, dense, form]
            assert found_norms == norms
            assert all(torch.equal(found[name], value) for name, value in expected.items()), form


@pytest.mark.parametrize("dtype,dense", KINDS)
def test_two_levels_are_one_level_within_rounding(of_four_ranks, dtype, dense):
    """A rank owns the same weights in both."""
    is_whole = dtype == torch.float32
    for of_rank in of_four_ranks:
        (norms, found, kept), (one_norms, one, one_kept) = (
            of_rank[dtype, dense, form] for form in ("as it is", "one level")
        )
        assert norms == pytest.approx(one_norms, rel=1e-5 if is_whole else 5e-3)
        for name, value in one.items():
            torch.testing.assert_close(found[name], value, rtol=0.02, atol=1e-5 if is_whole else 4e-3)
        assert kept.keys() == one_kept.keys()
        for key, value in one_kept.items():
            error = torch.linalg.vector_norm(kept[key] - value) / torch.linalg.vector_norm(value).clamp_min(1e-12)
            assert error < (1e-4 if is_whole else 0.02), key


def test_few_bits_are_for_the_outer_level(of_four_ranks):
    exact, rounded = (of_four_ranks[0][torch.bfloat16, False, form] for form in ("as it is", "8 bits"))
    assert rounded[0] != exact[0] and rounded[0] == pytest.approx(exact[0], rel=0.01)
    found = [one[torch.bfloat16, False, "8 bits"] for one in of_four_ranks]
    assert all(torch.equal(one[1][name], value) for one in found for name, value in rounded[1].items())


def with_a_bad_step(ranks):
    model = Words(torch.bfloat16)
    exchange = Owners(backward_order(model), groups_of(model), 1e-2, by_rows=model.embedding.weight)
    learn(model, exchange, ranks.rank, steps=1)
    before = weights(model)
    norms = learn(model, exchange, ranks.rank, steps=1, broken=0)
    same = all(torch.equal(before[name], value) for name, value in weights(model).items())
    return norms + learn(model, exchange, ranks.rank, steps=1), same


def test_all_nodes_see_what_is_not_finite_on_one_rank(tmp_path):
    found = on_ranks(with_a_bad_step, tmp_path, 4, ranks_per_node=2)
    for (bad, good), same in found:
        assert math.isnan(bad) and same and good == found[0][0][1] and math.isfinite(good)


def by_layout(ranks):
    """Returns sizes of levels, norms and weights, by dtype and ranks per node. Of the bucket of vectors rank 0 owns
    all, and the others padding.
    """
    found = {}
    for dtype, n_local in itertools.product((torch.float32, torch.bfloat16), (6, 3, 2, 1)):
        model = Words(dtype)
        with mock.patch("distillation.owners.local_world_size", lambda n=n_local: n):
            exchange = Owners(backward_order(model), groups_of(model), 1e-2, True, model.embedding.weight)
        norms = learn(model, exchange, ranks.rank, steps=3)
        found[dtype, n_local] = ([level.size for level in exchange.levels], norms, weights(model))
    return found


def test_three_nodes_and_nodes_of_three_learn_like_one(tmp_path):
    found = on_ranks(by_layout, tmp_path, 6)
    for dtype, rtol, atol in ((torch.float32, 1e-5, 1e-5), (torch.bfloat16, 5e-3, 4e-3)):
        _, one_norms, one = found[0][dtype, 6]
        for n_local, expected in {6: [6], 3: [3, 2], 2: [2, 3], 1: [6]}.items():
            sizes, norms, learnt = found[0][dtype, n_local]
            assert sizes == expected and norms == pytest.approx(one_norms, rel=rtol)
            for name, value in learnt.items():
                torch.testing.assert_close(value, one[name], rtol=0.02, atol=atol)
                assert all(torch.equal(of_rank[dtype, n_local][2][name], value) for of_rank in found)


# --- whole runs ----------------------------------------------------------------------------------------------

SHORT = dict(max_steps=4, save_interval=2, warmup_ratio=0.0, gradient_exchange="owners", batch_size=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


def train(models, folder, n_ranks=4, ranks_per_node=2, **changes):
    argv = options(models, folder, **{**SHORT, "student_model": models / "plain", **changes})
    codes, log = fresh.ranks(argv, n_ranks, arm=keep_final_weights, ranks_per_node=ranks_per_node)
    assert codes == [0] * n_ranks, log[-4000:]
    return folder


def sit_unequally(rank):
    """Has ranks 2 and 3 say that they are alone on their nodes."""
    if rank > 1:
        os.environ.update(LOCAL_WORLD_SIZE="1", LOCAL_RANK="0")


def test_nodes_of_unequal_size_are_refused_in_one_line(models, tmp_path):
    argv = options(models, tmp_path / "out", **SHORT)
    codes, log = fresh.ranks(argv, 4, arm=sit_unequally, ranks_per_node=2)
    assert 0 not in codes and not (tmp_path / "out" / "checkpoint-0").exists()
    assert "--nproc_per_node: nodes have [1, 2] ranks; start the same number on each" in log and "Traceback" not in log


def figures(folder):
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(folder)]


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """Returns a run on two nodes of two ranks."""
    return train(models, tmp_path_factory.mktemp("whole") / "out")


def resumed(whole, models, folder, *layout, **changes):
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("checkpoint-4", "latest"))
    return train(models, folder, *layout, resume="auto", **changes)


def test_a_resumed_run_on_two_nodes_is_the_run(whole, models, tmp_path):
    again = resumed(whole, models, tmp_path / "out")
    assert figures(again) == figures(whole)
    for rank in (0, 3):
        found, expected = (torch.load(folder / f"rank-{rank}.pt") for folder in (again, whole))
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    "n_ranks,ranks_per_node,exchange", [(4, 4, "owners"), (2, 2, "owners"), (4, 2, "allreduce"), (1, 1, "owners")]
)
def test_any_layout_resumes_it(whole, models, tmp_path, n_ranks, ranks_per_node, exchange):
    changes = dict(gradient_exchange=exchange, batch_size=4 // n_ranks)
    other = resumed(whole, models, tmp_path / "out", n_ranks, ranks_per_node, **changes)
    for one, two in zip(figures(other), figures(whole), strict=True):
        assert one == pytest.approx(two, rel=1e-3)
