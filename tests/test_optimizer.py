"""Which parameters decay, the learning rate of every step, and the optimizer that a run builds from both, on one rank
and on two.
"""

import logging

import pytest
import torch
from torch import nn

from distillation.adamw import MasterWeightAdamW
from distillation.exchange import AllReduce, gradient_norm
from distillation.update import LossScale, step_or_skip
from processes.ranks import process_groups
from tests.parsing import train_options
from tests.tiny import MixedParameters, give_gradients, tiny_hybrid, tiny_student, weights
from tests.two_ranks import on_two_ranks
from training_utils import build_optimizer, build_schedule, parameter_groups, warmup_steps

CPU = torch.device("cpu")


# --- parameter groups ----------------------------------------------------------------------------------------


def test_only_matrices_decay():
    model = MixedParameters()
    matrices, vectors = parameter_groups(model, 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in matrices["params"]] == [id(model.matrix), id(model.conv)]
    assert [id(p) for p in vectors["params"]] == [id(model.bias), id(model.scale)]


def test_groups_of_a_student():
    student = tiny_student()
    for name in ("mlp", "mixer"):
        getattr(student.backbone.layers[0], name).requires_grad_(False)
    groups = parameter_groups(student, 0.1)
    names = {id(p): name for name, p in student.named_parameters()}
    decaying, others = ({names[id(p)] for p in group["params"]} for group in groups)
    assert decaying | others == {name for name, p in student.named_parameters() if p.requires_grad}
    assert not decaying & others
    assert {"backbone.layers.1.mixer.conv1d.weight", "backbone.layers.1.mixer.in_proj.weight"} <= decaying
    assert {"backbone.layers.1.mixer.D", "backbone.final_layernorm.weight"} <= others
    assert not any("norm" in name or name.endswith("bias") for name in decaying)
    assert sum(len(group["params"]) for group in groups) == len(decaying) + len(others)  # tied weights once


def test_groups_without_members_are_left_out():
    model = MixedParameters()
    model.bias.requires_grad_(False)
    model.scale.requires_grad_(False)
    assert [group["weight_decay"] for group in parameter_groups(model, 0.1)] == [0.1]


def test_mixers_and_what_was_copied_are_groups_of_their_own():
    hybrid = tiny_hybrid()
    names = {id(p): name for name, p in hybrid.named_parameters()}
    groups = parameter_groups(hybrid, 0.1, 0.25)
    members = [{names[id(p)] for p in group["params"]} for group in groups]
    assert [(group["weight_decay"], group["lr_factor"]) for group in groups] == [
        *[(0.1, 1.0), (0.0, 1.0)],
        *[(0.1, 0.25), (0.0, 0.25)],
    ]
    mixers = {name for name in names.values() if ".mixer." in name}
    assert members[0] | members[1] == mixers and len(mixers) > 2
    assert members[2] | members[3] == set(names.values()) - mixers
    assert "backbone.layers.1.self_attn.q_proj.weight" in members[2]
    assert all((hybrid.get_parameter(name).dim() >= 2) is (i % 2 == 0) for i in range(4) for name in members[i])


def test_one_rate_for_all_gives_the_groups_of_earlier_versions():
    """Their order decides which rank owns a parameter."""
    hybrid = tiny_hybrid()
    trained = [p for p in hybrid.parameters() if p.requires_grad]
    matrices, vectors = parameter_groups(hybrid, 0.1, 1.0)
    assert [id(p) for p in matrices["params"]] == [id(p) for p in trained if p.dim() >= 2]
    assert [id(p) for p in vectors["params"]] == [id(p) for p in trained if p.dim() < 2]


# --- the schedule --------------------------------------------------------------------------------------------

TWENTY = "--max_lr 1e-3 --min_lr 1e-4 --warmup_ratio 0.2 --decay_ratio 0.25"
# Warm-up over 4 steps from min_lr, stable for 11, linear decay over 5; min_lr from there on.
TWENTY_LRS = [1e-4, 3.25e-4, 5.5e-4, 7.75e-4, *[1e-3] * 11, 1e-3, 8.2e-4, 6.4e-4, 4.6e-4, 2.8e-4, 1e-4, 1e-4]


def test_a_warm_up_of_a_preset_is_cut_in_a_short_run(caplog):
    """One that is given leaves room for the decay: others are refused."""
    caplog.set_level(logging.INFO, logger="train")
    short, long = train_options("--preset llama-8b --max_steps 50"), train_options("--preset llama-8b")
    assert warmup_steps(long, long.max_steps) == 100 and not caplog.records
    assert warmup_steps(short, 50) == 50 - round(short.decay_ratio * 50)
    assert "--warmup_steps 100 of --preset llama-8b: cut to" in caplog.text


def learning_rates(line, total_steps, done, n):
    """Returns the learning rates of `n` steps, as the optimizer sees them."""
    args = train_options(line)
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=args.max_lr)
    schedule = build_schedule(optimizer, args, total_steps, done)
    found = []
    for _ in range(n):
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert first == second == schedule.get_last_lr()[0]
        found.append(first)
        optimizer.step()
        schedule.step()
    return found


def test_warm_up_stable_decay():
    assert learning_rates(TWENTY, 20, done=0, n=22) == pytest.approx(TWENTY_LRS, rel=1e-12)


@pytest.mark.parametrize("done", [1, 4, 9, 15, 17, 20])
def test_a_resumed_run_has_the_rest_of_the_same_schedule(done):
    rest = learning_rates(TWENTY, 20, done, n=22 - done)
    assert rest == learning_rates(TWENTY, 20, done=0, n=22)[done:]


@pytest.mark.parametrize(
    "done,lr",
    [
        (0, 1e-8),
        (500, 5.005e-6),
        (1000, 1e-5),
        (50_000, 1e-5),
        (90_000, 1e-5),
        (95_000, 5.005e-6),
        (100_000, 1e-8),
    ],
)
def test_the_production_schedule(done, lr):
    assert learning_rates("", 100_000, done, n=1) == pytest.approx([lr], rel=1e-9)


def test_warm_up_in_steps_replaces_the_ratio():
    line = TWENTY.replace("0.2 ", "0.5 ") + " --max_steps 20 --warmup_steps 4"
    assert learning_rates(line, 20, done=0, n=22) == pytest.approx(TWENTY_LRS, rel=1e-12)
    assert learning_rates(f"{line.removesuffix('4')}0", 20, done=0, n=1) == [1e-3]


@pytest.mark.parametrize("done", [0, 3, 17])
def test_what_was_copied_learns_at_a_part_of_the_mixers_rate_at_every_step(done):
    args, hybrid = train_options(TWENTY), tiny_hybrid()
    optimizer = torch.optim.SGD(parameter_groups(hybrid, 0.1, 0.25), lr=args.max_lr)
    schedule = build_schedule(optimizer, args, 20, done)
    for lr in TWENTY_LRS[done:]:
        assert schedule.get_last_lr() == pytest.approx([lr, lr, lr / 4, lr / 4], rel=1e-12)
        assert [group["lr"] for group in optimizer.param_groups] == schedule.get_last_lr()
        optimizer.step()
        schedule.step()


def test_schedules_without_warm_up_or_decay():
    assert learning_rates("--max_lr 1 --warmup_ratio 0 --decay_ratio 0", 3, done=0, n=3) == [1, 1, 1]
    assert learning_rates("--max_lr 0 --min_lr 0", 3, done=0, n=3) == [0, 0, 0]


# --- on one rank and on two ----------------------------------------------------------------------------------


def test_masters_are_kept_as_asked(no_torchrun):
    with process_groups(CPU):
        for line, kept in (("", True), ("--no_master_weights", False)):
            args = train_options(line)
            optimizer = build_optimizer(MixedParameters(), args.max_lr, args.weight_decay, args.master_weights)
            assert optimizer.optim.master_weights is kept


STEPS = 6
TRAINING = "--max_lr 1e-2 --min_lr 1e-4 --weight_decay 0.1 --warmup_ratio 0.34 --decay_ratio 0.34 --grad_clip 1.0"


def train_mixed(dtype):
    """Makes `STEPS` updates with the optimizer and schedule of a run, on gradients that are the same on all ranks, as
    after DDP. Returns the model and the optimizer.
    """
    args, model = train_options(TRAINING), MixedParameters(dtype)
    optimizer = build_optimizer(model, args.max_lr, args.weight_decay, args.master_weights)
    schedule = build_schedule(optimizer, args, STEPS, done=0)
    for step in range(STEPS):
        give_gradients(model, seed=step)
        step_or_skip(AllReduce(model, optimizer), LossScale.for_dtype(dtype), args.grad_clip, loss=2.0)
        schedule.step()
    return model, optimizer


def expected_weights(dtype):
    """Returns the weights after the same updates by one process without ZeRO, every quantity by hand."""
    model = MixedParameters(dtype)
    optimizer = MasterWeightAdamW(parameter_groups(model, 0.1), betas=(0.9, 0.95))
    # Warm-up over 2 of 6 steps, stable for 2, decay over 2.
    for step, lr in enumerate([1e-4, 5.05e-3, 1e-2, 1e-2, 1e-2, 5.05e-3]):
        for group in optimizer.param_groups:
            group["lr"] = lr
        give_gradients(model, seed=step)
        norm = gradient_norm(model).item()
        for parameter in model.parameters():
            if parameter.grad is not None and norm > 1.0:
                parameter.grad.mul_(1.0 / norm)
        optimizer.step()
    return weights(model)


def masters(model, optimizer):
    """Returns the dtype of the master weight (None without one) of each parameter whose state this rank holds."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {names[id(parameter)]: entry for parameter, entry in optimizer.optim.state.items()}
    return {name: entry["master"].dtype if "master" in entry else None for name, entry in state.items()}


def work(ranks):
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = train_mixed(dtype)
        found[dtype] = {"weights": weights(model), "masters": masters(model, optimizer)}
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Returns what each of two real ranks found."""
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_cover_everything_and_each_master_is_on_one_rank(two_ranks, dtype):
    first, second = (found[dtype]["masters"] for found in two_ranks)
    assert first.keys() | second.keys() == {"matrix", "conv", "bias", "scale"}
    assert not first.keys() & second.keys()
    assert first and second
    expected = torch.float32 if dtype == torch.bfloat16 else None
    assert set(first.values()) | set(second.values()) == {expected}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_ranks_step_like_one_process(two_ranks, dtype):
    first, second = (found[dtype]["weights"] for found in two_ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, value in expected_weights(dtype).items():
        torch.testing.assert_close(first[name], value, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_rank_needs_no_special_path(no_torchrun, dtype):
    with process_groups(CPU):
        model, optimizer = train_mixed(dtype)
        found, kept = weights(model), masters(model, optimizer)
        del model, optimizer
    assert kept.keys() == {"matrix", "conv", "bias", "scale"}
    before = weights(MixedParameters(dtype))
    for name, value in expected_weights(dtype).items():
        torch.testing.assert_close(found[name], value, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=1e-8)
        assert torch.equal(found[name], before[name]) is (name == "frozen")
