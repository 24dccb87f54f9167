"""One update: the loss scale of float16, the gradient norm, clipping, and the steps that are skipped because something
is not finite.
"""

import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn

from distillation.adamw import MasterWeightAdamW
from distillation.exchange import AllReduce, gradient_norm
from distillation.objective import Distillation
from distillation.update import LossScale, step_or_skip
from tests.tiny import MixedParameters, give_gradients, weights
from tests.two_ranks import on_two_ranks
from training_utils import Meter, parameter_groups


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


def test_a_loss_scale_resumes_from_a_checkpoint():
    """Its fields survive JSON, and a scale made from them continues as the first does."""
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
    model = MixedParameters(dtype)
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
    """Subtracts the gradient times the group's grad_factor, which `update` sets."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_((parameter.grad.float() * group["grad_factor"]).to(parameter.dtype))


def prepared(dtype=torch.float32, grad_factor=1.0):
    """Returns a model with gradients and an optimizer that subtracts them."""
    model = MixedParameters(dtype)
    give_gradients(model, seed=3, factor=grad_factor)
    return model, GradientStep([p for p in model.parameters() if p.requires_grad])


def distance(before, model):
    return torch.cat([(before[name] - value).flatten() for name, value in weights(model).items()]).norm().item()


def assert_unmoved(before, model):
    """Asserts that no weight moved and that the gradients are zeros, not None."""
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("grad_clip", [0.25, 1.0])
def test_clipping_scales_to_the_clip_and_the_norm_is_that_before(grad_clip):
    model, optimizer = prepared()
    before, norm = weights(model), gradient_norm(model).item()
    gradient = model.matrix.grad.clone()
    assert norm > 5
    assert step_or_skip(AllReduce(model, optimizer), no_scale(), grad_clip, loss=2.0) == (norm, "stepped")
    assert distance(before, model) == pytest.approx(grad_clip, rel=1e-5)
    torch.testing.assert_close(before["matrix"] - model.matrix.detach(), gradient * (grad_clip / norm))
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("grad_clip", [0.0, 1e4])
def test_small_gradients_and_clip_0_are_left_as_they_are(grad_clip):
    model, optimizer = prepared()
    expected = {name: p.detach() - p.grad if p.requires_grad else p for name, p in model.named_parameters()}
    assert step_or_skip(AllReduce(model, optimizer), no_scale(), grad_clip, loss=2.0)[1] == "stepped"
    assert all(torch.equal(expected[name], value) for name, value in weights(model).items())


BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_is_skipped_before_the_weights_move(bad, dtype):
    model, optimizer = prepared(dtype)
    before = weights(model)
    model.bias.grad[2] = bad
    norm, outcome = step_or_skip(AllReduce(model, optimizer), LossScale.for_dtype(dtype), 1.0, loss=2.0)
    assert outcome == "bad" and not math.isfinite(norm)
    assert_unmoved(before, model)
    give_gradients(model, seed=4)  # the next update is an ordinary one
    assert step_or_skip(AllReduce(model, optimizer), LossScale.for_dtype(dtype), 1.0, loss=2.0)[1] == "stepped"
    assert distance(before, model) == pytest.approx(1.0, rel=1e-5 if dtype == torch.float32 else 2**-6)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loss_that_is_not_finite_is_skipped_though_gradients_are(bad, dtype):
    """Another rank's loss can be NaN, and a mask can keep NaN out of the gradients. The loss scale stays."""
    model, optimizer = prepared(dtype)
    before, norm, scale = weights(model), gradient_norm(model).item(), LossScale.for_dtype(dtype)
    factor = scale.value
    assert step_or_skip(AllReduce(model, optimizer), scale, 1.0, loss=bad) == (norm / factor, "bad")
    assert_unmoved(before, model)
    assert scale.value == factor


@pytest.mark.parametrize("master_weights", [True, False])
def test_a_skipped_update_leaves_the_optimizer_as_it_was(master_weights):
    model = MixedParameters(torch.bfloat16)
    optimizer = MasterWeightAdamW(parameter_groups(model, 0.1), lr=1e-2, master_weights=master_weights)
    give_gradients(model, seed=0)
    step_or_skip(AllReduce(model, optimizer), no_scale(), 1.0, loss=2.0)
    before = {p: {name: value.clone() for name, value in state.items()} for p, state in optimizer.state.items()}
    give_gradients(model, seed=1)
    assert step_or_skip(AllReduce(model, optimizer), no_scale(), 1.0, loss=float("nan"))[1] == "bad"
    assert before.keys() == optimizer.state.keys()
    for parameter, state in before.items():
        assert all(torch.equal(value, optimizer.state[parameter][name]) for name, value in state.items())


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_scaled_gradients_are_unscaled(grad_clip):
    scale = float16_scale()
    scaled, plain = prepared(grad_factor=scale.value), prepared()
    norm, _ = step_or_skip(AllReduce(*plain), no_scale(), grad_clip, loss=2.0)
    assert step_or_skip(AllReduce(*scaled), scale, grad_clip, loss=2.0) == (pytest.approx(norm, rel=1e-6), "stepped")
    for name, value in weights(plain[0]).items():
        torch.testing.assert_close(weights(scaled[0])[name], value)
    assert (scale.value, scale.good_steps) == (2.0**14, 1)


def test_an_overflow_of_float16_skips_the_step_and_halves_the_scale():
    model, optimizer = prepared(torch.float16)
    before, scale = weights(model), float16_scale()
    model.conv.grad[0] = float("inf")
    norm, outcome = step_or_skip(AllReduce(model, optimizer), scale, 1.0, loss=2.0)
    assert outcome == "overflow" and not norm < float("inf")
    assert_unmoved(before, model)
    assert scale.value == 2.0**13
    give_gradients(model, seed=4, factor=scale.value * 1e-3)
    norm, outcome = step_or_skip(AllReduce(model, optimizer), scale, 1.0, loss=2.0)
    assert outcome == "stepped" and norm < 1.0
    assert distance(before, model) > 0


def test_small_float16_gradients_are_not_lost_when_they_are_unscaled():
    """A gradient of 1e-8 is 0 in float16 and 1.6e-4 under the scale; Adam moves by it as by a larger one."""
    weight = nn.Parameter(torch.full((8, 8), 0.01, dtype=torch.float16))
    model = nn.ParameterList([weight])
    optimizer = MasterWeightAdamW([weight], lr=0.1)
    scale = float16_scale()
    weight.grad = torch.full_like(weight, 1e-8 * scale.value)
    step_or_skip(AllReduce(model, optimizer), scale, 1.0, loss=2.0)
    moved = 0.01 - weight.detach().float()
    torch.testing.assert_close(moved, torch.full((8, 8), 0.05), rtol=0.02, atol=0.0)  # lr * g / (g + eps)


def test_a_float16_run_that_diverged_is_not_taken_for_overflows():
    """NaN weights overflow at every scale: once the scale is 1, the outcome has to be "bad"."""
    model, optimizer = prepared(torch.float16)
    before, scale, outcomes = weights(model), float16_scale(), []
    for _ in range(20):
        model.bias.grad = torch.full_like(model.bias, float("nan"))
        outcomes.append(step_or_skip(AllReduce(model, optimizer), scale, 1.0, loss=2.0)[1])
    assert outcomes == ["overflow"] * 14 + ["bad"] * 6
    assert scale.value == 1.0
    assert_unmoved(before, model)


def step_with_a_bad_loss_on_rank_1(ranks):
    """Returns the outcome, how far the weights moved, and the windows suspected."""
    meter, model = Meter(Distillation.named), MixedParameters()
    optimizer = GradientStep([p for p in model.parameters() if p.requires_grad])
    for micro_step in range(2):
        is_bad = ranks.rank == 1 and micro_step == 1
        meter.add(torch.tensor([float("nan") if is_bad else 1.0, 1.0, 1.0, 0.0]), (2 * micro_step + ranks.rank,))
    give_gradients(model, seed=0)
    before = weights(model)
    _, outcome = step_or_skip(AllReduce(model, optimizer), no_scale(), 1.0, meter.means()["loss"])
    return outcome, distance(before, model), meter.windows(only_bad=True)


def test_a_loss_that_is_bad_on_one_rank_is_skipped_by_all(tmp_path):
    found = on_two_ranks(step_with_a_bad_loss_on_rank_1, tmp_path)
    assert found == [("bad", 0.0, []), ("bad", 0.0, [3])]
