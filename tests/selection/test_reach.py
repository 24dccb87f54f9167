"""Teachers of which only some key/value heads see far: against attention in plain steps, and where copying sits."""

import pytest
import torch
from transformers.models.llama import modeling_llama

from benchmarks.planted_teacher import VOCAB, planted_teacher
from selection import reach
from selection.ablation import mean_growth
from selection.dealing import Dealt
from selection.heads import find_heads, shapes_of_heads
from selection.material import Material
from selection.probes import random_copies
from selection.reach import ShortSighted, rounds, thinned_out
from tests.selection.one_rank import RANK
from tests.tiny import tiny_teacher, tokens


@pytest.fixture
def sees(monkeypatch):
    monkeypatch.setattr(reach, "FIRST", 2)
    monkeypatch.setattr(reach, "LAST", 3)


def attention(far, index):
    """Returns attention whose weights of what a head does not see are zero; of layer `index`, `far` see all."""

    def attend(module, q, k, v, mask, scaling, **_):
        if module.layer_idx != index:
            return modeling_llama.eager_attention_forward(module, q, k, v, mask, scaling)
        out = torch.zeros_like(q)  # (n, H, S, P)
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // k.shape[1])
            for i in range(q.shape[2]):
                seen = [j for j in range(i + 1) if group in far or j < 2 or i - j < 3]
                weights = (k[:, group, seen] @ q[:, head, i, :, None] * scaling).softmax(1)  # (n, seen, 1)
                out[:, head, i] = (weights * v[:, group, seen]).sum(1)
        return out.transpose(1, 2), None

    return attend


@pytest.mark.parametrize("far", [set(), {1}])
@torch.no_grad()
def test_a_short_sighted_head_sees_the_first_tokens_and_the_last(far, sees, monkeypatch):
    teacher, ids = tiny_teacher(initializer_range=0.3), tokens(2, 20)
    probe = random_copies(range(50), 2, 10, 2, seed=0)
    short = ShortSighted(teacher, [type(probe)("copying", ids, probe.answer, probe.text, 0.0)])
    all_groups = frozenset(short.groups_of(range(4)))
    found = short.scores(all_groups - {(2, group) for group in range(2) if group not in far})
    monkeypatch.setitem(modeling_llama.ALL_ATTENTION_FUNCTIONS._global_mapping, "by_hand", attention(far, 2))
    teacher.config._attn_implementation = "by_hand"
    mask = torch.full((20, 20), -torch.inf).triu(1)[None, None]
    log_p = teacher(ids, attention_mask=mask).logits.log_softmax(-1)
    for row in range(2):
        places = (probe.answer[row] >= 0).nonzero()[:, 0]
        loss = -log_p[row, places - 1, ids[row, places]].mean().item()
        assert found["copying"].loss[row] == pytest.approx(loss, abs=1e-4)


def test_if_all_see_far_it_is_the_teacher(sees):
    teacher = tiny_teacher(initializer_range=0.3)
    probe = random_copies(range(50), 2, 10, 2, seed=0)
    short = ShortSighted(teacher, [probe])
    with torch.no_grad():
        hidden = teacher.model(probe.ids).last_hidden_state
    every = frozenset(short.groups_of(range(4)))
    assert short.scores(every)["copying"].loss == pytest.approx(probe.score(hidden, teacher.lm_head).loss, abs=1e-5)
    before = short.scores(every - {(1, 0)})
    short.prepare(every - {(3, 1)})  # another base changes nothing
    assert short.scores(every - {(1, 0)})["copying"].loss == pytest.approx(before["copying"].loss, abs=1e-5)
    assert before != short.scores(every)


def test_the_query_heads_of_a_group():
    short = ShortSighted(tiny_teacher(), [random_copies(range(50), 2, 10, 2, seed=0)])
    assert short.groups_of([1, 3]) == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert short.heads_of({(3, 0), (1, 1)}) == [(1, 2), (1, 3), (3, 0), (3, 1)]


def test_a_pair_of_which_none_brings_anything_alone_is_found():
    """From nothing, both heads of a pair look useless; from all, losing one of them loses everything."""
    groups, pair = [(layer, 0) for layer in range(20)], {(3, 0), (17, 0)}

    def measure(far, some):
        return [0.0 if pair <= far - {group} else 1.0 for group in some]

    path = thinned_out(groups, 2, measure)
    assert path[-1] == pair and [len(far) for far in path] == [20, 15, 12, 9, 7, 6, 5, 4, 3, 2]
    assert all(later < earlier for earlier, later in zip(path, path[1:], strict=False))
    assert rounds(20, 2) == [20, 15, 12, 9, 7, 6, 5, 4, 3] and rounds(20, 20) == []


def induction_found(seed, noise=0.012):
    """Returns the group that is found in a planted teacher, and that which copies."""
    model, circuit = planted_teacher(seed, noise=noise)
    probes = [random_copies(range(VOCAB), 6, 24, 4, seed)]
    material = Material(torch.zeros(3, 2, dtype=torch.int64), probes)
    dealt = Dealt(RANK, None, shapes_of_heads(material.part(False), material.part(True)))
    found = find_heads(model, 2, [], dealt, material)
    layer, head = circuit.induction
    return found, [f"{layer}:{2 * (head // 2) + i}" for i in range(2)]


@pytest.mark.parametrize("seed", range(2))
def test_the_head_that_copies_is_found(seed):
    """And not the one that it needs to look at the token before: a recurrent head can do that."""
    found, expected = induction_found(seed)
    assert found["names"] == expected == found["sets"][-2]["heads"]
    right = [one["probes"]["copying"]["acc"]["mean"] for one in found["sets"]]
    assert right[-2] > 0.9 and right[-1] < 0.2 and found["sets"][-1]["n_groups"] == 0
    assert found["sets"][0]["n_groups"] == 12 and found["sets"][0]["probes"]["copying"]["acc"]["n"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.012, 0.02])
@pytest.mark.parametrize("seed", range(20))
def test_in_every_seed(seed, noise):
    found, expected = induction_found(seed, noise)
    assert found["names"] == expected


def test_whole_layers_are_no_candidates_and_see_far():
    model, circuit = planted_teacher(0)
    probes = [random_copies(range(VOCAB), 6, 24, 4, 0)]
    material = Material(torch.zeros(3, 2, dtype=torch.int64), probes)
    dealt = Dealt(RANK, None, shapes_of_heads(material.part(False), material.part(True)))
    whole = [circuit.induction[0]]
    found = find_heads(model, 4, whole, dealt, material)
    assert not {name for name in found["names"] if int(name.split(":")[0]) in whole} and found["whole"] == whole
    assert found["sets"][-1]["probes"]["copying"]["acc"]["mean"] > 0.9  # none of the others is needed
    rows = [name for name in dealt.rows.rows if name.startswith("heads ")]
    assert all(f"{whole[0]}:0,{whole[0]}:1" in name for name in rows)
    short = ShortSighted(model, material.part(False).probes)
    some = frozenset(short.groups_of(range(6))) - {(5 if whole != [5] else 4, 0)}
    [row] = [row for name, row in dealt.rows.rows.items() if name == f"heads {_names(some)}"]
    assert mean_growth(row.probes, short.scores(some)) == pytest.approx(0, abs=1e-5)


def _names(far):
    return ",".join("{}:{}".format(*group) for group in sorted(far))
