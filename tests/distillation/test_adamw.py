"""What moves the weights, each part against numbers worked out by hand or against PyTorch: the optimizer, its schedule,
the update, and all of them on two real ranks.
"""

import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn

from arguments import parse_train_args
from distillation.adamw import LossScale, MasterWeightAdamW, gradient_norm, update
from processes.ranks import process_groups
from tests.tiny import tiny_student
from tests.two_ranks import on_two_ranks
from training_utils import Meter, build_optimizer, build_schedule, parameter_groups

CPU = torch.device("cpu")


def options(line=""):
    return parse_train_args(line.split())


class Mixed(nn.Module):
    """Parameters of one, two and three dimensions, one of them frozen."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(7, 5, generator=g).to(dtype))
        self.conv = nn.Parameter(torch.randn(4, 1, 3, generator=g).to(dtype))
        self.bias = nn.Parameter(torch.randn(6, generator=g).to(dtype))
        self.scale = nn.Parameter(torch.randn((), generator=g).to(dtype))
        self.frozen = nn.Parameter(torch.randn(3, 3, generator=g).to(dtype), requires_grad=False)


def give_gradients(model, seed, factor=1.0):
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = (factor * torch.randn(parameter.shape, generator=g)).to(parameter.dtype)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# --- MasterWeightAdamW ---------------------------------------------------------------------------------------


def test_in_float32_it_is_pytorchs_adamw():
    own_model, torch_model = Mixed(), Mixed()
    own = MasterWeightAdamW(parameter_groups(own_model, 0.3), lr=1e-3)
    theirs = torch.optim.AdamW(parameter_groups(torch_model, 0.3), lr=1e-3, betas=(0.9, 0.95), foreach=False)
    assert [group["weight_decay"] for group in own.param_groups] == [0.3, 0.0]
    for step in range(20):
        for optimizer, model in ((own, own_model), (theirs, torch_model)):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 + step % 5)
            give_gradients(model, seed=step)
            optimizer.step()
    before = weights(Mixed())
    for name, value in weights(own_model).items():
        torch.testing.assert_close(value, weights(torch_model)[name], rtol=1e-6, atol=1e-9)
        assert torch.equal(value, before[name]) is (name == "frozen")


def steps_of(optimizer_class, dtype, n=40, lr=1e-5):
    """A weight matrix as large as a model's, before and after `n` steps along one noisy direction."""
    g = torch.Generator().manual_seed(0)
    start = (0.05 * torch.randn(64, 64, generator=g)).bfloat16()
    direction = torch.randn(64, 64, generator=g).sign()
    weight = nn.Parameter(start.to(dtype, copy=True))
    optimizer = optimizer_class([weight], lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(n):
        weight.grad = (direction + 0.1 * torch.randn(64, 64, generator=g)).bfloat16().to(dtype)
        optimizer.step()
    return start, weight.detach(), optimizer.state[weight]


def share_moved(start, weight):
    return (weight != start).float().mean().item()


def test_in_bfloat16_small_steps_add_up():
    start, own, _ = steps_of(MasterWeightAdamW, torch.bfloat16)
    _, exact, _ = steps_of(torch.optim.AdamW, torch.float32)
    _, plain, _ = steps_of(torch.optim.AdamW, torch.bfloat16)
    assert own.dtype == torch.bfloat16
    torch.testing.assert_close(own.float(), exact, rtol=2**-8, atol=1e-7)  # no more than rounded
    assert (own == exact.bfloat16()).float().mean() > 0.999
    moved, could_move, moved_by_plain = (share_moved(start, w) for w in (own, exact.bfloat16(), plain))
    assert moved == pytest.approx(could_move, abs=0.002)
    assert moved > 0.9
    assert moved_by_plain < 0.3  # what this optimizer is for


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_and_moments_are_float32(dtype):
    _, weight, state = steps_of(MasterWeightAdamW, dtype, n=3)
    assert {name: value.dtype for name, value in state.items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq", "master"), torch.float32
    )
    assert torch.equal(state["master"].to(dtype), weight)
    assert not torch.equal(state["master"], weight.float())


def test_a_float32_parameter_is_its_own_master():
    _, _, state = steps_of(MasterWeightAdamW, torch.float32, n=1)
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}


def without_masters(parameters, **options):
    return MasterWeightAdamW(parameters, master_weights=False, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_masters_a_step_is_the_rounding_of_float32s(dtype):
    """Of the 16-bit weight, at every step; moments are float32 as with masters."""
    own_model, reference = Mixed(dtype), Mixed(dtype)
    own = without_masters(parameter_groups(own_model, 0.3), lr=1e-2)
    moments = {}
    for step in range(5):
        give_gradients(own_model, seed=step)
        own.step()
        for name, parameter in reference.named_parameters():
            if not parameter.requires_grad:
                continue
            exact = nn.Parameter(parameter.detach().float())
            decay = 0.3 if parameter.dim() >= 2 else 0.0
            adamw = torch.optim.AdamW([exact], lr=1e-2, betas=(0.9, 0.95), weight_decay=decay, foreach=False)
            if name in moments:
                adamw.state[exact] = moments[name]
            exact.grad = own_model.get_parameter(name).grad.float()
            adamw.step()
            moments[name] = adamw.state[exact]
            parameter.data.copy_(exact.detach())
        for name, value in weights(reference).items():
            assert torch.equal(weights(own_model)[name], value), (step, name)
    for name, moment in moments.items():
        state = own.state[own_model.get_parameter(name)]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"} and state["exp_avg"].dtype == torch.float32
        torch.testing.assert_close(state["exp_avg"], moment["exp_avg"])
        torch.testing.assert_close(state["exp_avg_sq"], moment["exp_avg_sq"])
        assert state["step"] == moment["step"] == 5


def test_without_masters_small_steps_are_lost():
    start, own, _ = steps_of(MasterWeightAdamW, torch.bfloat16)
    _, lossy, state = steps_of(without_masters, torch.bfloat16)
    assert "master" not in state
    assert share_moved(start, lossy) < 0.3 < 0.9 < share_moved(start, own)


def test_in_float32_masters_make_no_difference():
    _, own, state = steps_of(MasterWeightAdamW, torch.float32, n=3)
    _, other, other_state = steps_of(without_masters, torch.float32, n=3)
    assert torch.equal(own, other) and state.keys() == other_state.keys()


@pytest.mark.parametrize("make", [MasterWeightAdamW, without_masters])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_are_stepped_like_the_whole(monkeypatch, make, dtype):
    _, whole, state = steps_of(make, dtype, n=3)
    monkeypatch.setattr(MasterWeightAdamW, "SLICE", 1000)
    _, sliced, sliced_state = steps_of(make, dtype, n=3)
    assert torch.equal(whole, sliced)
    assert all(torch.equal(value, sliced_state[name]) for name, value in state.items())


def test_masters_are_kept_as_asked(no_torchrun):
    with process_groups(CPU):
        found = [build_optimizer(Mixed(), options(line)).optim.master_weights for line in ("", "--no_master_weights")]
    assert found == [True, False]


def test_a_parameter_without_a_gradient_stays():
    model = Mixed(torch.bfloat16)
    optimizer = MasterWeightAdamW(parameter_groups(model, 0.5), lr=0.1)
    model.matrix.grad = torch.ones_like(model.matrix)
    optimizer.step()
    before = weights(Mixed(torch.bfloat16))
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {"matrix"}


# --- parameter groups ----------------------------------------------------------------------------------------


def test_only_matrices_decay():
    model = Mixed()
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
    model = Mixed()
    model.bias.requires_grad_(False)
    model.scale.requires_grad_(False)
    assert [group["weight_decay"] for group in parameter_groups(model, 0.1)] == [0.1]


# --- the schedule --------------------------------------------------------------------------------------------

TWENTY = "--max_lr 1e-3 --min_lr 1e-4 --warmup_ratio 0.2 --decay_ratio 0.25"
# Warm-up over 4 steps from min_lr, stable for 11, linear decay over 5; min_lr from there on.
TWENTY_LRS = [1e-4, 3.25e-4, 5.5e-4, 7.75e-4, *[1e-3] * 11, 1e-3, 8.2e-4, 6.4e-4, 4.6e-4, 2.8e-4, 1e-4, 1e-4]


def learning_rates(line, total_steps, done, n):
    """Of `n` steps, as the optimizer sees them."""
    args = options(line)
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
def test_a_run_that_goes_on_has_the_rest_of_the_same_schedule(done):
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


def test_schedules_without_warm_up_or_decay():
    assert learning_rates("--max_lr 1 --warmup_ratio 0 --decay_ratio 0", 3, done=0, n=3) == [1, 1, 1]
    assert learning_rates("--max_lr 0 --min_lr 0", 3, done=0, n=3) == [0, 0, 0]


# --- loss scale, norm, update --------------------------------------------------------------------------------


def float16_scale(**changes):
    return LossScale(**{**asdict(LossScale.for_dtype(torch.float16)), **changes})


def no_scale():
    return LossScale.for_dtype(torch.float32)


def test_the_float16_scale_halves_and_doubles():
    scale = float16_scale(growth_interval=3)
    values = []
    for overflowed in (False, False, True, False, False, False, False, False, False, True):
        scale.update(overflowed)
        values.append(scale.value / 2**14)
    assert values == [1, 1, 0.5, 0.5, 0.5, 1, 1, 1, 2, 1]


def test_the_float16_scale_never_drops_below_1():
    scale, values = float16_scale(), []
    for _ in range(20):
        scale.update(overflowed=True)
        values.append(scale.value)
    assert values == [max(2.0 ** (13 - n), 1.0) for n in range(20)]


def test_a_loss_scale_goes_on_from_a_checkpoint():
    """Its fields are JSON, and what is made from them does what the first would have done."""
    first = float16_scale(growth_interval=5)
    for overflowed in (True, False, False, False):
        first.update(overflowed)
    second = LossScale(**json.loads(json.dumps(asdict(first))))
    assert second == first
    for scale in (first, second):
        scale.update(overflowed=False)
        scale.update(overflowed=False)
    assert second == first and second.value == 2.0**14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_have_no_scale(dtype):
    scale = LossScale.for_dtype(dtype)
    assert scale.growth_interval == 1000
    scale.growth_interval = 1
    scale.update(overflowed=True)
    scale.update(overflowed=False)
    assert (scale.value, scale.active) == (1.0, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_norm(dtype):
    model = Mixed(dtype)
    give_gradients(model, seed=1)
    flat = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
    assert gradient_norm(model).dtype == torch.float32
    assert gradient_norm(model).item() == pytest.approx(flat.norm().item(), rel=1e-6)


@pytest.mark.parametrize("dtype,size", [(torch.bfloat16, 2.0**-6), (torch.float16, 300.0)])
def test_the_norm_of_sixteen_bit_gradients_is_float32s(dtype, size):
    """A sum in bfloat16 would stop growing, one in float16 overflow."""
    model = nn.Linear(300, 300, bias=False).to(dtype)
    model.weight.grad = torch.full_like(model.weight, size)
    assert gradient_norm(model).item() == pytest.approx(300 * size, rel=1e-3)


class GradientStep(torch.optim.Optimizer):
    """Descends by the gradient as `update` hands it on: lr 1, times the group's grad_factor."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_((parameter.grad.float() * group["grad_factor"]).to(parameter.dtype))


def prepared(dtype=torch.float32, grad_factor=1.0):
    """A model with gradients, and an optimizer whose steps are the gradients."""
    model = Mixed(dtype)
    give_gradients(model, seed=3, factor=grad_factor)
    return model, GradientStep([p for p in model.parameters() if p.requires_grad])


def distance(before, model):
    return torch.cat([(before[name] - value).flatten() for name, value in weights(model).items()]).norm().item()


def assert_unmoved(before, model):
    """Weights are as they were, and the gradients are gone: zeros, not None."""
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("grad_clip", [0.25, 1.0])
def test_clipping_scales_to_the_clip_and_the_norm_is_that_before(grad_clip):
    model, optimizer = prepared()
    before, norm = weights(model), gradient_norm(model).item()
    gradient = model.matrix.grad.clone()
    assert norm > 5
    assert update(model, optimizer, no_scale(), grad_clip, loss=2.0) == (norm, "stepped")
    assert distance(before, model) == pytest.approx(grad_clip, rel=1e-5)
    torch.testing.assert_close(before["matrix"] - model.matrix.detach(), gradient * (grad_clip / norm))
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("grad_clip", [0.0, 1e4])
def test_small_gradients_and_clip_0_are_left_as_they_are(grad_clip):
    model, optimizer = prepared()
    expected = {name: p.detach() - p.grad if p.requires_grad else p for name, p in model.named_parameters()}
    assert update(model, optimizer, no_scale(), grad_clip, loss=2.0)[1] == "stepped"
    assert all(torch.equal(expected[name], value) for name, value in weights(model).items())


BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_is_skipped_before_the_weights_move(bad, dtype):
    model, optimizer = prepared(dtype)
    before = weights(model)
    model.bias.grad[2] = bad
    norm, outcome = update(model, optimizer, LossScale.for_dtype(dtype), 1.0, loss=2.0)
    assert outcome == "bad" and not math.isfinite(norm)
    assert_unmoved(before, model)
    give_gradients(model, seed=4)  # and the next one is made as if nothing had been
    assert update(model, optimizer, LossScale.for_dtype(dtype), 1.0, loss=2.0)[1] == "stepped"
    assert distance(before, model) == pytest.approx(1.0, rel=1e-5 if dtype == torch.float32 else 2**-6)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loss_that_is_not_finite_is_skipped_though_gradients_are(bad, dtype):
    """Another rank's loss can be it, and a mask can keep it out of the gradients. No scale is to blame for it."""
    model, optimizer = prepared(dtype)
    before, norm, scale = weights(model), gradient_norm(model).item(), LossScale.for_dtype(dtype)
    factor = scale.value
    assert update(model, optimizer, scale, 1.0, loss=bad) == (norm / factor, "bad")
    assert_unmoved(before, model)
    assert scale.value == factor


@pytest.mark.parametrize("optimizer_class", [MasterWeightAdamW, without_masters])
def test_a_skipped_update_leaves_the_optimizer_as_it_was(optimizer_class):
    model = Mixed(torch.bfloat16)
    optimizer = optimizer_class(parameter_groups(model, 0.1), lr=1e-2)
    give_gradients(model, seed=0)
    update(model, optimizer, no_scale(), 1.0, loss=2.0)
    before = {p: {name: value.clone() for name, value in state.items()} for p, state in optimizer.state.items()}
    give_gradients(model, seed=1)
    assert update(model, optimizer, no_scale(), 1.0, loss=float("nan"))[1] == "bad"
    assert before.keys() == optimizer.state.keys()
    for parameter, state in before.items():
        assert all(torch.equal(value, optimizer.state[parameter][name]) for name, value in state.items())


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_scaled_gradients_are_unscaled(grad_clip):
    scale = float16_scale()
    scaled, plain = prepared(grad_factor=scale.value), prepared()
    norm, _ = update(*plain, no_scale(), grad_clip, loss=2.0)
    assert update(*scaled, scale, grad_clip, loss=2.0) == (pytest.approx(norm, rel=1e-6), "stepped")
    for name, value in weights(plain[0]).items():
        torch.testing.assert_close(weights(scaled[0])[name], value)
    assert (scale.value, scale.good_steps) == (2.0**14, 1)


def test_an_overflow_of_float16_skips_the_step_and_halves_the_scale():
    model, optimizer = prepared(torch.float16)
    before, scale = weights(model), float16_scale()
    model.conv.grad[0] = float("inf")
    norm, outcome = update(model, optimizer, scale, 1.0, loss=2.0)
    assert outcome == "overflow" and not norm < float("inf")
    assert_unmoved(before, model)
    assert scale.value == 2.0**13
    give_gradients(model, seed=4, factor=scale.value * 1e-3)
    norm, outcome = update(model, optimizer, scale, 1.0, loss=2.0)
    assert outcome == "stepped" and norm < 1.0
    assert distance(before, model) > 0


def test_small_float16_gradients_are_not_lost_when_they_are_unscaled():
    """A gradient of 1e-8 is 0 in float16 and 1.6e-4 under the scale; Adam moves by it as by a larger one."""
    weight = nn.Parameter(torch.full((8, 8), 0.01, dtype=torch.float16))
    model = nn.ParameterList([weight])
    optimizer = MasterWeightAdamW([weight], lr=0.1)
    scale = float16_scale()
    weight.grad = torch.full_like(weight, 1e-8 * scale.value)
    update(model, optimizer, scale, 1.0, loss=2.0)
    moved = 0.01 - weight.detach().float()
    torch.testing.assert_close(moved, torch.full((8, 8), 0.05), rtol=0.02, atol=0.0)  # lr * g / (g + eps)


def test_a_float16_run_that_diverged_for_good_is_told_from_overflows():
    """Weights that are NaN overflow at every scale; called overflows for ever, that would hide it."""
    model, optimizer = prepared(torch.float16)
    before, scale, outcomes = weights(model), float16_scale(), []
    for _ in range(20):
        model.bias.grad = torch.full_like(model.bias, float("nan"))
        outcomes.append(update(model, optimizer, scale, 1.0, loss=2.0)[1])
    assert outcomes == ["overflow"] * 14 + ["bad"] * 6
    assert scale.value == 1.0
    assert_unmoved(before, model)


# --- two real ranks ------------------------------------------------------------------------------------------

STEPS = 6
TRAINING = "--max_lr 1e-2 --min_lr 1e-4 --weight_decay 0.1 --warmup_ratio 0.34 --decay_ratio 0.34 --grad_clip 1.0"


def train_mixed(dtype):
    """`STEPS` updates of the project's own optimizer and schedule, with the gradients that DDP would have made the
    same on all ranks. Returns the model and the optimizer.
    """
    args, model = options(TRAINING), Mixed(dtype)
    optimizer = build_optimizer(model, args)
    schedule = build_schedule(optimizer, args, STEPS, done=0)
    for step in range(STEPS):
        give_gradients(model, seed=step)
        update(model, optimizer, LossScale.for_dtype(dtype), args.grad_clip, loss=2.0)
        schedule.step()
    return model, optimizer


def expected_weights(dtype):
    """The same by one process without ZeRO, every quantity by hand."""
    model = Mixed(dtype)
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
    """Names of the parameters whose state this rank keeps, and the masters among it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = {names[id(parameter)]: entry for parameter, entry in optimizer.optim.state.items()}
    return {name: entry["master"].dtype if "master" in entry else None for name, entry in state.items()}


def bad_on_one_rank(rank):
    """A step whose loss is NaN on rank 1 alone: what each rank makes of it, and the windows that it suspects."""
    meter, model = Meter(CPU), Mixed()
    optimizer = GradientStep([p for p in model.parameters() if p.requires_grad])
    for micro_step in range(2):
        is_bad = rank == 1 and micro_step == 1
        meter.add(torch.tensor([float("nan") if is_bad else 1.0, 1.0, 1.0, 0.0]), (2 * micro_step + rank,))
    give_gradients(model, seed=0)
    before = weights(model)
    _, outcome = update(model, optimizer, no_scale(), 1.0, meter.means()["loss"])
    return outcome, distance(before, model), meter.windows(only_bad=True)


def work(ranks):
    found = {"bad": bad_on_one_rank(ranks.rank)}
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = train_mixed(dtype)
        found[dtype] = {"weights": weights(model), "masters": masters(model, optimizer)}
    return found


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two real processes found."""
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
    before = weights(Mixed(dtype))
    for name, value in expected_weights(dtype).items():
        torch.testing.assert_close(found[name], value, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=1e-8)
        assert torch.equal(found[name], before[name]) is (name == "frozen")


def test_a_loss_that_is_bad_on_one_rank_is_skipped_by_all(two_ranks):
    assert [found["bad"] for found in two_ranks] == [("bad", 0.0, []), ("bad", 0.0, [3])]
