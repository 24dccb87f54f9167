"""The times of a plan: work by operations and bytes, the wire, what bounds a step, and what helps."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from arguments import parse_train_args
from llamba.kernels import kernels_for
from preflight.footprint import ADDING_UP, measure_footprint
from preflight.kernel_bytes import counted_as_on_gpus
from preflight.live_memory import LiveMemory
from preflight.machine import Machine
from preflight.plan import Plan, alternatives, make_plan
from preflight.speedups import PRICES, best_of, faster_options, speedups
from preflight.step_time import ANSWERS, STUDENTS, TEACHER, WIRE, StepTime
from preflight.time_report import accumulation_table, accumulations, bottleneck
from preflight.transport import HOST_MEMORY, RATES, SOCKETS, Link, find_link
from preflight.update_footprint import NORM_AND_CLEARING, gradient_bytes, optimizer_footprint
from preflight.wire import NOTHING, Seats, Traffic, all_reduce_and_broadcasts, traffic_of
from tests.parsing import train_options
from tests.preflight.test_footprint import folder, options

__all__ = ["folder"]  # a fixture
MACHINE = Machine(n_gpus=5, gpu_bytes=80e9, speed=650e12)
GRADIENTS = 2 * 2_934_887_296  # bytes, of the production run


# --- work ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bytes_of_a_small_module_are_those_counted_by_hand(device):
    layer = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4, bias=False)).to(device)
    x = torch.ones(32, 8, device=device)
    with LiveMemory([*layer.parameters(), x]) as memory:
        loss = layer(x).sum()
        loss.backward()
    numbers = 2 * 32 * 16  # tanh
    numbers += 32 * 4 + 1  # the sum
    numbers += 1 + 1  # ones, like the loss: it is given, but not read more than its place
    numbers += 3 * 32 * 16  # backward of tanh: the gradient, tanh's result, and what is written
    numbers += 32 * 16 + 16  # the gradient of the bias
    assert memory.moved.total() == pytest.approx(4 * numbers, abs=16)


def passes(work, *given):
    """Returns the bytes that some work moves."""
    with LiveMemory(given) as memory:
        work(*given)
    return memory.moved.total()


def test_bytes_of_single_operations():
    x, y, table = torch.ones(100, 50), torch.ones(100, 50), torch.ones(10_000, 50)
    rows, size = torch.zeros(100, dtype=torch.int64), x.nbytes
    for work, bytes_moved in (
        (lambda: x + y, 3 * size),
        (lambda: x + y[:1].expand(100, 50), 2 * size + 200),  # of what is repeated, what there is
        (lambda: x.add_(y), 3 * size),
        (lambda: x.mul_(2.0), 2 * size),
        (lambda: x.copy_(y), 2 * size),
        (lambda: x.zero_(), size),
        (lambda: torch.add(x, y, out=x), 3 * size),
        (lambda: x.bfloat16(), size + size // 2),
        (lambda: F.embedding(rows, table), rows.nbytes + 2 * size),  # not the whole table
        (lambda: table[rows], rows.nbytes + 2 * size),
        (lambda: torch._foreach_mul_([x, y], 2.0), 4 * size),
        (lambda: x.t()[1:].view(-1, 25, 4).detach(), 0),
        (lambda: torch.empty_like(x), 0),
        (lambda: x @ y.t(), 0),  # counts as operations
    ):
        assert passes(work) == bytes_moved, bytes_moved / size


def test_a_scan_counts_as_that_of_kernels():
    """A quarter, forward and backward, of exactly what is the scan's."""
    moved = []
    for by_kernels in (False, True):
        with torch.device("meta"):
            given = [torch.ones(2, 256, *shape, requires_grad=True) for shape in ((4, 16), (4,), (2, 8), (2, 8))]
        with LiveMemory(given) as memory, counted_as_on_gpus(memory, torch.float32) if by_kernels else nullcontext():
            y, _ = kernels_for("meta", torch.float32).scan(*(m + 1 for m in given), 64)
            forward = memory.moved.total()
            loss = y.exp().sum()
            middle = memory.moved.total() - forward
            loss.backward()
            assert memory.weight == 1.0
        moved.append((forward, middle, memory.moved.total() - forward - middle))
    plain, kernels = moved
    before = 2 * sum(m.nbytes for m in given)
    after = 2 * y.nbytes  # exp's backward pass
    assert kernels[0] - before == pytest.approx((plain[0] - before) / 4, abs=100)
    assert kernels[1] == plain[1]
    assert kernels[2] - after == pytest.approx((plain[2] - after) / 4, abs=100)


@pytest.mark.parametrize(
    "name,shapes,fused",
    [
        ("rms_norm", [(8, 512, 64), (64,), None], 14),
        ("swiglu", [(8, 512, 64), (8, 512, 64)], 16),
        ("gate", [(8, 512, 4, 16), (8, 512, 4, 16), (4,), (8, 512, 64), (64,)], 30),
    ],
)
def test_norms_swiglus_and_gates_count_as_fused_kernels(name, shapes, fused):
    """As many bytes for each number, forward and backward in bfloat16, as docs/performance.md says."""
    with torch.device("meta"):
        given = [1e-5 if s is None else torch.ones(s, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    tensors = [m for m in given if isinstance(m, torch.Tensor)]
    with LiveMemory(tensors) as memory, counted_as_on_gpus(memory, torch.bfloat16):
        y = getattr(kernels_for("meta", torch.bfloat16).elementwise, name)(*given)
        forward = memory.moved.total()
        y.backward(torch.empty_like(y))
    assert 0 < forward < memory.moved.total()
    assert memory.moved.total() / y.numel() == pytest.approx(fused, rel=0.1)


def test_the_optimizer_reads_and_writes_each_of_its_tensors(folder):
    """Of a shard: gradient, master, both moments and their temporaries; of all gradients the norm and the clearing."""
    args = parse_train_args(options(folder, "wide", "--seq_length 8 --dtype bfloat16"))
    student = measure_footprint(args).student
    gradients = gradient_bytes(student)
    one, two = (optimizer_footprint(student, args, n_ranks).moved for n_ranks in (1, 2))
    n_weights = gradients / 2
    own = (one - NORM_AND_CLEARING * gradients) / n_weights
    assert 40 < own < 60  # bytes per weight: masters and moments are read and written in 24, its gradient in 24
    assert (two - NORM_AND_CLEARING * gradients) / (one - NORM_AND_CLEARING * gradients) == pytest.approx(0.5, abs=0.1)


def test_work_is_operations_and_bytes(folder):
    args = parse_train_args(options(folder, "wide", "--seq_length 40"))
    footprint = measure_footprint(args)
    assert footprint.moved["backward's own"] > ADDING_UP * gradient_bytes(footprint.student)
    assert footprint.moved.keys() == footprint.operations.keys()
    student = MACHINE.seconds(sum(footprint.operations.values()), sum(footprint.moved.values()))
    teacher = MACHINE.seconds(footprint.teacher.operations, footprint.teacher.moved)
    steps = {name: make_plan(args, footprint, MACHINE, name).step for name in ("dedicated", "colocated", "shared")}
    assert {name: step.student for name, step in steps.items()} == pytest.approx(dict.fromkeys(steps, student))
    times = {"dedicated": 4 * teacher, "colocated": teacher, "shared": 5 * teacher}
    assert {name: step.teacher for name, step in steps.items()} == pytest.approx(times)
    assert {name: step.ahead for name, step in steps.items()} == {"dedicated": 1, "colocated": 0, "shared": 0}


# --- the wire ------------------------------------------------------------------------------------------------


def student_of_8b(embedding_learns=True):
    """Returns a module without memory that has the trained weights of the production run."""
    with torch.device("meta"):
        student = nn.Module()
        student.backbone = nn.Module()
        student.backbone.embedding = nn.Embedding(128256, 4096, dtype=torch.bfloat16)
        rest = GRADIENTS // 2 - student.backbone.embedding.weight.numel()
        student.lm_head = nn.Linear(rest, 1, bias=False, dtype=torch.bfloat16)  # and all others
    student.get_input_embeddings = lambda: student.backbone.embedding
    student.backbone.embedding.requires_grad_(embedding_learns)
    return student


def test_the_wire_of_the_production_run():
    traffic = all_reduce_and_broadcasts(student_of_8b(), n_ranks=4, rate=5e9)
    received = sum(traffic.received.values())
    assert received == pytest.approx(2.25 * GRADIENTS)
    assert received / 5e9 == pytest.approx(2.7, rel=0.03)
    # Broadcasts come one after another, and take G / b for the 0.75 G that a rank receives.
    assert traffic.exposed(0.0) == pytest.approx(2.5 * GRADIENTS / 5e9) == pytest.approx(2.9, rel=0.02)
    assert traffic.exposed(0.09) == pytest.approx(traffic.exposed(0.0) - 0.09)


def test_the_last_gradients_are_never_hidden():
    trained, frozen = (all_reduce_and_broadcasts(student_of_8b(learns), 4, 50e9) for learns in (True, False))
    embedding = 2 * 128256 * 4096
    assert trained.exposed(10.0) == pytest.approx(1.5 * embedding / 50e9 + GRADIENTS / 50e9)
    assert frozen.exposed(10.0) == frozen.weights == pytest.approx((GRADIENTS - embedding) / 50e9)


@pytest.mark.parametrize("bits,share", [(16, 0.72), (8, 0.425), (4, 0.285)])
def test_owners_are_sent_what_the_prototype_measured(bits, share):
    """As a part of the bytes of trained weights: with four ranks, and rows for 2048 of the embedding's 128,256."""
    args = train_options(f"--gradient_exchange owners --gradient_bits {bits} --batch_size 2 --seq_length 1024")
    traffic = traffic_of(args, student_of_8b(), Seats(4, 5e9))
    assert sum(traffic.received.values()) / GRADIENTS == pytest.approx(share, rel=0.03)
    assert traffic.received["rows of the embedding"] == pytest.approx(0.75 * 2048 * 4096 * 2, rel=1e-6)
    # Changes of weights are not hidden, nor the last bucket and the rows.
    assert traffic.exposed(10.0) * 5e9 == pytest.approx(
        traffic.received["changed weights"]
        + traffic.received["rows of the embedding"]
        + 0.75 * 128 * 2**20 * {16: 1, 8: 130 / 256, 4: 18 / 64}[bits],
        rel=1e-6,
    )


@pytest.mark.parametrize("bits,coded", [(16, 1.0), (8, 130 / 256), (4, 18 / 64)])
def test_a_node_receives_gradients_once_for_all_its_ranks(bits, coded):
    """And what its ranks send each other, which is in their own dtype, passes faster links."""
    args = train_options(f"--gradient_exchange owners --gradient_bits {bits} --batch_size 2 --seq_length 1024")
    student, dense, row = student_of_8b(), GRADIENTS - 2 * 128256 * 4096, 2048 * 4096 * 2
    traffic = traffic_of(args, student, Seats(16, 5e9, n_nodes=2, inside_rate=20e9))
    assert traffic.received == pytest.approx(
        {
            "gradients": 7 / 8 * dense + coded * dense / 2 / 8,
            "rows of the embedding": 7 / 8 * row + row / 2,
            "changed weights": 0.14 * GRADIENTS * (7 / 8 + 1 / 2 / 8),
        }
    )
    inside, between = 7 / 8 * (dense + row), (coded * dense + 8 * row) / 2
    assert traffic.gradients == pytest.approx(inside / 20e9 + between / 5e9)
    assert traffic.weights == pytest.approx(0.14 * GRADIENTS * (7 / 8 / 20e9 + 1 / 2 / 5e9))
    # With one rank a node, or one node, all ranks exchange with all others.
    assert traffic_of(args, student, Seats(2, 5e9, n_nodes=2)) == traffic_of(args, student, Seats(2, 5e9))


def test_an_embedding_that_is_the_head_or_frozen_has_no_rows():
    args = train_options("--gradient_exchange owners")
    assert traffic_of(args, student_of_8b(embedding_learns=False), Seats(4, 5e9)).received["rows of the embedding"] == 0


def test_owners_have_equal_shards_however_many_they_are(folder):
    """Of masters and moments, 12 bytes a weight; the gradients of others arrive in float32."""
    args = parse_train_args(options(folder, "wide", "--gradient_exchange owners --dtype bfloat16"))
    student = measure_footprint(args).student
    n = gradient_bytes(student) // 2
    for n_ranks in (1, 4, 32):
        found = optimizer_footprint(student, args, n_ranks)
        assert found.kept == 12 * (n // n_ranks) + 4  # and its count of steps
        assert found.arrived == 4 * (n // n_ranks)
        # What is sent and what arrives; rows of the embedding follow when these have gone.
        in_buckets = 2 * n - student.get_input_embeddings().weight.nbytes
        assert found.in_flight == (n_ranks > 1) * 2 * in_buckets and found.full_after == 1.0


@pytest.mark.parametrize("exchange", ["allreduce", "owners"])
def test_one_rank_sends_nothing(exchange):
    assert traffic_of(train_options(f"--gradient_exchange {exchange}"), student_of_8b(), Seats(1, 5e9)) == NOTHING


def test_what_a_rank_receives(folder):
    args = parse_train_args(options(folder, "wide", "--seq_length 40 --batch_size 2 --grad_accumulation_steps 3"))
    footprint = measure_footprint(args)
    trained = gradient_bytes(footprint.student)
    assert make_plan(args, footprint, MACHINE, "dedicated").received == {
        "gradients": round(2 * 3 / 4 * trained),
        "updated weights": round(3 / 4 * trained),
        "teacher's answers": 3 * 2 * 40 * 256 * 4,
    }
    assert "teacher's answers" not in make_plan(args, footprint, MACHINE, "colocated").received
    nodes = dataclasses.replace(MACHINE, n_nodes=2)
    assert make_plan(args, footprint, nodes, "dedicated").received["updated weights"] == round(7 / 8 * trained)


# --- a step, and what bounds it ------------------------------------------------------------------------------

SLOW_WIRE = Traffic({}, gradients=2.0, last_gradients=0.2, weights=1.0)


def step(**changes):
    usual = {"micro_steps": 1, "forward": 0.1, "backward": 0.2, "teacher": 0.05, "answers": 0.0, "ahead": 1}
    return StepTime(**{**usual, "update": 0.02, "traffic": NOTHING, **changes})


@pytest.mark.parametrize(
    ("changes", "seconds", "part"),
    [
        ({}, 0.32, STUDENTS),
        ({"micro_steps": 4}, 1.22, STUDENTS),
        ({"teacher": 0.5}, 0.5, TEACHER),  # of one micro step the teacher is ahead
        ({"teacher": 0.5, "micro_steps": 4}, 2.0, TEACHER),
        ({"teacher": 0.5, "answers": 0.9}, 0.9, ANSWERS),
        ({"traffic": SLOW_WIRE}, 0.32 + 2.8, WIRE),
        # 16 backward passes, of which the last alone hides gradients
        ({"traffic": SLOW_WIRE, "micro_steps": 16}, 16 * 0.3 + 0.02 + 2.8, STUDENTS),
        # While ranks exchange gradients, the teacher answers one batch more, and no other.
        ({"traffic": SLOW_WIRE, "teacher": 0.5, "micro_steps": 4}, 3 * 0.5 + 0.3 + 0.02 + 2.8, WIRE),
        ({"traffic": SLOW_WIRE, "teacher": 0.5, "ahead": 2, "micro_steps": 4}, 2 * 0.5 + 0.3 + 0.02 + 2.8, WIRE),
        ({"ahead": 0, "micro_steps": 4}, 4 * (0.3 + 0.05) + 0.02, STUDENTS),
        ({"ahead": 0, "micro_steps": 4, "teacher": 0.4}, 4 * (0.3 + 0.4) + 0.02, TEACHER),
    ],
)
def test_a_step_and_what_bounds_it(changes, seconds, part):
    made = step(**changes)
    assert made.seconds == pytest.approx(seconds) and made.bound_by == part


def test_accumulations_side_by_side():
    moments = {"student GPU": {"forward": {"all": int(51e9)}}}
    made = [Plan("dedicated", 4, 4, moments, step(traffic=SLOW_WIRE, micro_steps=n), 0, 8192) for n in (1, 4, 16)]
    lines = accumulation_table(made[1], made).splitlines()
    assert [line[: line.index("  ")] for line in lines[1:]] == ["1", "4, as asked", "16"]
    assert lines[1].endswith(WIRE) and lines[3].endswith(STUDENTS) and " 51.0 " in lines[1]
    assert f" {16 * 8192 / 7.62:,.0f} " in lines[3]
    numbers = [one.grad_accumulation_steps for one in accumulations(train_options("--grad_accumulation_steps 2"))]
    assert numbers == [1, 2, 4, 16]


def test_sums_in_float32_take_time_and_memory(folder):
    """More micro steps than one need them, unless they are asked not to."""
    text = "--seq_length 8 --dtype bfloat16 --grad_accumulation_steps"
    plans = []
    for more in ("1", "2", "2 --grad_accumulation_dtype weights"):
        args = parse_train_args(options(folder, "wide", f"{text} {more}"))
        footprint = measure_footprint(args)
        plans.append(make_plan(args, footprint, MACHINE, "dedicated"))
    one, two, like_weights = plans
    sums = 2 * gradient_bytes(footprint.student)
    assert two.largest - one.largest == sums and like_weights.largest == one.largest
    assert two.step.backward - one.step.backward == pytest.approx(sums / MACHINE.memory_rate)
    assert like_weights.step.student == one.step.student


# --- what helps ----------------------------------------------------------------------------------------------


def best(folder, text, monkeypatch, link=RATES[SOCKETS], settings=("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE")):
    for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE"):
        monkeypatch.setenv(name, str(int(name in settings)))
    args = parse_train_args(options(folder, "wide", f"--seq_length 40 {text}"))
    machine = dataclasses.replace(MACHINE, link=Link(link, "here"))
    footprint = measure_footprint(args)
    plan = make_plan(args, footprint, machine, args.placement)
    others = [make_plan(args, footprint, machine, "colocated")] if args.placement == "dedicated" else []
    options_to_try = [(change, new) for change, new in (*alternatives(args), *faster_options(args)) if change in PRICES]
    changes = [(change, new, measure_footprint(new)) for change, new in options_to_try]
    return plan, best_of(speedups(args, footprint, machine, [plan, *others], changes))


def test_on_a_slow_wire_accumulating_and_a_faster_way_help(folder, monkeypatch):
    plan, (first, second) = best(folder, "--freeze_mlp --freeze_replaced_layers", monkeypatch)
    assert plan.step.bound_by == WIRE
    assert first.change == "--grad_accumulation_steps 16" and 8 < first.factor < 16
    assert first.price == f"a step then learns from {16 * plan.tokens:,} tokens"
    assert second.change.startswith("unset NCCL_SHM_DISABLE") and second.price == ""
    assert second.factor == pytest.approx(RATES[HOST_MEMORY] / RATES[SOCKETS], rel=0.1)
    text = bottleneck(plan, MACHINE, [first, second])
    assert text.startswith(f"Bound by {WIRE}: without it a step would be 9")
    assert "What helps most: --grad_accumulation_steps 16" in text
    assert "Without a change of the training: unset NCCL_SHM_DISABLE" in text
    assert text.endswith("Give --link_gb_per_s what doctor.py --collectives measures on your machine.")
    measured = dataclasses.replace(MACHINE, link=find_link(3.0, 1))
    assert "doctor.py --collectives measures" not in bottleneck(plan, measured, [first, second])


def test_what_does_not_apply_is_not_advised(folder, monkeypatch):
    text = "--freeze_mlp --freeze_replaced_layers --grad_accumulation_steps 16 --teacher_placement colocated"
    text += " --gradient_exchange owners"
    _, found = best(folder, text, monkeypatch, settings=())
    assert found == []
    plan, found = best(folder, text.replace("colocated", "dedicated"), monkeypatch, 1e15, settings=())
    assert [one.change for one in found] == ["--teacher_placement colocated"]
    assert "No single option" not in bottleneck(plan, MACHINE, found)


def test_weights_that_need_not_learn_are_named(folder, monkeypatch):
    _, (first, *_) = best(
        folder,
        "--grad_accumulation_steps 16 --teacher_placement colocated --gradient_exchange owners",
        monkeypatch,
        settings=(),
    )
    assert first.change == "--freeze_mlp" and first.price
