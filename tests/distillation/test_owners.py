"""The exchange of gradients with the owners of weights: its codes, and on real ranks against one process."""

import itertools
import math
from unittest import mock

import pytest
import torch
from torch import nn

from distillation.changes import apply_changes, count_longer, encode_changes, most_longer
from distillation.gradient_codes import gradient_code
from distillation.owners import IN_FLIGHT, Owners
from processes.ranks import process_groups
from tests.distillation.few_words import Words, backward_order, groups_of, learn, weights
from tests.two_ranks import on_ranks, on_two_ranks


def test_any_two_weights_are_coded():
    generator = torch.Generator().manual_seed(0)
    old = torch.randint(-(2**15), 2**15, (40_000,), generator=generator, dtype=torch.int16)
    step = torch.tensor([0, 1, -1, 2, -2, -(2**15), 77], dtype=torch.int16)
    new = old + step[torch.randint(7, (40_000,), generator=generator)]
    old[:6] = torch.tensor([0, -(2**15), 32767, -1, 0x7FC0, 0x3F80])  # 0, -0.0, NaNs, 1
    new[:6] = torch.tensor([-(2**15), 0, -(2**15), 0, 0x7FC1, -0x4080])
    pair = old.view(torch.bfloat16), new.view(torch.bfloat16)
    count = int(count_longer(*pair))
    for room in (count, count + 5):  # another rank's piece may need more
        weights = old.clone().view(torch.bfloat16)
        codes, longer = encode_changes(*pair, room)
        apply_changes(weights, codes, longer)
        assert torch.equal(weights.view(torch.int16), new)
        assert len(codes) == 10_000 and len(longer) == room
    assert 0.5 < count / 40_000 < 0.6


def test_the_code_is_never_longer_than_the_weights():
    for n in (128, 1280):
        assert n / 4 + 2 * most_longer(n) <= 2 * n < n / 4 + 2 * (most_longer(n) + 1)
    old = torch.zeros(16, dtype=torch.bfloat16)
    codes, longer = encode_changes(old, old, room=0)
    assert not codes.any() and len(longer) == 0 and count_longer(old, torch.ones_like(old)) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_gradients_are_rounded_to_a_part_of_the_largest_of_their_block(dtype, bits):
    generator = torch.Generator().manual_seed(0)
    pieces = torch.randn(3, 512, generator=generator).mul_(torch.logspace(-3, 1, 512)).to(dtype)
    pieces[:, 128:256] = 0
    code = gradient_code(bits, dtype)
    message = code.encode(pieces)
    assert message.dtype == torch.uint8 and message.shape[0] == 3
    decoded = torch.stack([code.decode(one) for one in message])
    if bits == 16:
        assert torch.equal(decoded, pieces.float())
        return
    block, top = (128, 127) if bits == 8 else (32, 7)
    assert message.shape[1] == 512 * bits // 8 + 2 * 512 // block
    largest = pieces.float().view(3, -1, block).abs().amax(-1, keepdim=True).expand(-1, -1, block).reshape(3, 512)
    assert ((decoded - pieces.float()).abs() <= largest * (0.5 / top + 2**-8)).all()
    assert not decoded[:, 128:256].any()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_arrives_so(bits, value):
    pieces = torch.ones(2, 256)
    pieces[1, 7] = value
    code = gradient_code(bits, torch.float32)
    fine, broken = (code.decode(one) for one in code.encode(pieces))
    assert torch.isfinite(fine).all() and not torch.isfinite(broken[7]) and torch.isfinite(broken[128:]).all()


FORMS = {
    "as it is": {},
    "small buckets": {"bucket_bytes": 200},  # and a parameter in several messages
    "whole weights": {},
    "dense embedding": {"by_rows": None},
    "8 bits": {"gradient_bits": 8, "by_rows": None},
    "8 bits, small buckets": {"gradient_bits": 8, "by_rows": None, "bucket_bytes": 200},
}


def by_owners(ranks):
    """Returns norms and weights by dtype, tied or not, and form of the exchange."""
    found = {}
    for dtype, tied, form in itertools.product((torch.float32, torch.bfloat16), (False, True), FORMS):
        model = Words(dtype, tied)
        rows = None if tied else model.embedding.weight
        exchange = Owners(backward_order(model), groups_of(model), 1e-2, **{"by_rows": rows, **FORMS[form]})
        room = (lambda n: -1) if form == "whole weights" else most_longer
        with mock.patch("distillation.owners.most_longer", room):
            norms = learn(model, exchange, ranks.rank)
        found[dtype, tied, form] = (norms, weights(model), len(exchange.buckets))
    return found


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    return on_two_ranks(by_owners, tmp_path_factory.mktemp("owners"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_no_bit_depends_on_the_form_of_the_exchange(of_two_ranks, dtype, tied):
    one, other = of_two_ranks
    start = weights(Words(dtype, tied))
    for form in FORMS:
        norms, expected, n_buckets = one[dtype, tied, "8 bits" if "8 bits" in form else "as it is"]
        for found_norms, found, _ in (one[dtype, tied, form], other[dtype, tied, form]):
            assert found_norms == norms and len(set(norms)) == 5
            assert all(torch.equal(found[name], value) for name, value in expected.items()), form
    assert one[dtype, tied, "8 bits"][0] != one[dtype, tied, "as it is"][0]
    assert {name for name in start if torch.equal(start[name], expected[name])} == {"frozen.weight", "frozen.bias"}
    assert one[dtype, tied, "small buckets"][2] > n_buckets


@pytest.mark.parametrize("tied", [False, True])
def test_two_ranks_step_like_one_process_with_both_batches(of_two_ranks, tied):
    """By torch's own AdamW, in float32."""
    model = Words(torch.float32, tied)
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2, betas=(0.9, 0.95))
    norms, found, _ = of_two_ranks[0][torch.float32, tied, "as it is"]
    for step in range(5):
        for micro_step, rank in itertools.product(range(2), range(2)):
            ids = torch.randint(103, (2, 5), generator=torch.Generator().manual_seed(10 * step + 2 * micro_step + rank))
            (model(ids).square().mean() / 2).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01).item()
        assert norms[step] == pytest.approx(norm, rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in weights(model).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def with_a_bad_step(ranks):
    found = []
    for bits in (16, 8, 4):
        model = Words(torch.bfloat16)
        rows = model.embedding.weight
        exchange = Owners(
            backward_order(model), groups_of(model), 1e-2, by_rows=rows, gradient_bits=bits, bucket_bytes=200
        )
        learn(model, exchange, ranks.rank, steps=2)
        before = weights(model)
        norms = learn(model, exchange, ranks.rank, steps=1, broken=0)
        same = all(torch.equal(before[name], value) for name, value in weights(model).items())
        found.append((norms[0], same, learn(model, exchange, ranks.rank, steps=2), weights(model)))
    return found


def test_all_ranks_see_what_is_not_finite_on_one(tmp_path):
    for one, other in zip(*on_two_ranks(with_a_bad_step, tmp_path), strict=True):
        assert math.isnan(one[0]) and math.isnan(other[0]) and one[1] and other[1]
        assert one[2] == other[2] and all(map(math.isfinite, one[2]))
        assert all(torch.equal(one[3][name], other[3][name]) for name in one[3])


def test_one_rank_sends_nothing(no_torchrun):
    with process_groups(torch.device("cpu")):
        for master_weights in (True, False):
            model = Words(torch.bfloat16)
            exchange = Owners(
                backward_order(model), groups_of(model), 1e-4, master_weights, by_rows=model.embedding.weight
            )
            before = weights(model)["inner.weight"]
            with mock.patch("distillation.owners.dist.all_to_all_single", side_effect=AssertionError):
                learn(model, exchange, 0, steps=60)
            moved = (weights(model)["inner.weight"] != before).float().mean()
            assert moved > 0.9 if master_weights else moved < 0.3
            kinds = {kind for _, kept in exchange.owned() for kind in kept}
            assert kinds == {"step", "exp_avg", "exp_avg_sq", *(["master"] * master_weights)}


def test_a_pass_that_was_not_begun_sends_nothing(no_torchrun):
    with process_groups(torch.device("cpu")):
        model = Words(torch.bfloat16)
        exchange = Owners(backward_order(model), groups_of(model), 1e-4)
        exchange.n_ranks = 2  # as far as hooks can see
        learn_nothing = mock.patch.object(exchange, "_send", side_effect=AssertionError)
        exchange.begin(is_last=True)
        exchange.clear()
        with learn_nothing:
            model(torch.arange(5)).sum().backward()
        assert exchange.missing == [len(bucket.parameters) for bucket in exchange.buckets]


def test_parameters_of_two_dtypes_are_not_cast_in_silence(no_torchrun):
    with process_groups(torch.device("cpu")):
        model = Words(torch.bfloat16)
        model.inner.float()
        with pytest.raises(AssertionError, match="one dtype"):
            Owners(backward_order(model), groups_of(model), 1e-4)


def most_under_way(ranks):
    """Returns how many messages are under way at most, with one level and with two."""
    most = []
    for n_local in (4, 2):
        model = Words(torch.bfloat16)
        with mock.patch("distillation.owners.local_world_size", lambda n=n_local: n):
            exchange = Owners(backward_order(model), groups_of(model), 1e-2, bucket_bytes=200)
        depart, counts = exchange._depart, []

        def counting(*message, exchange=exchange, depart=depart, counts=counts):
            depart(*message)
            counts.append(sum(map(len, exchange.flights)))

        with mock.patch.object(exchange, "_depart", counting):
            learn(model, exchange, ranks.rank, steps=1)
        most.append(max(counts))
    return most


def test_few_messages_are_under_way_at_a_time(tmp_path):
    """What `--dry_run` counts; there are many more to send."""
    assert on_ranks(most_under_way, tmp_path, 4) == [[IN_FLIGHT, IN_FLIGHT]] * 4


def sent_after_each_layer(ranks):
    """Returns how many buckets have been sent when each layer's gradients are there, by the order of the layers."""
    found = []
    for is_first_to_last in (True, False):
        layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(4))
        parameters = list(layers.parameters())
        order = parameters if is_first_to_last else parameters[::-1]
        exchange = Owners(order, [{"params": parameters}], 1e-4, bucket_bytes=16 * 16 * 4)
        exchange.begin(is_last=True)
        counts = []
        for parameter in order:
            parameter.sum().backward()
            counts.append(exchange.n_sent)
        exchange.norm()
        found.append(counts)
    return found


def test_buckets_are_sent_in_the_order_in_which_they_become_whole(tmp_path):
    assert on_two_ranks(sent_after_each_layer, tmp_path) == [[[1, 2, 3, 4]] * 2] * 2
