"""MasterWeightAdamW against PyTorch's AdamW and against steps worked out in float32."""

import pytest
import torch
from torch import nn

from distillation.adamw import MasterWeightAdamW
from tests.tiny import MixedParameters, give_gradients, weights
from training_utils import parameter_groups


def test_in_float32_it_is_pytorchs_adamw():
    own_model, torch_model = MixedParameters(), MixedParameters()
    own = MasterWeightAdamW(parameter_groups(own_model, 0.3), lr=1e-3)
    theirs = torch.optim.AdamW(parameter_groups(torch_model, 0.3), lr=1e-3, betas=(0.9, 0.95), foreach=False)
    assert [group["weight_decay"] for group in own.param_groups] == [0.3, 0.0]
    for step in range(20):
        for optimizer, model in ((own, own_model), (theirs, torch_model)):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (1 + step % 5)
            give_gradients(model, seed=step)
            optimizer.step()
    before = weights(MixedParameters())
    for name, value in weights(own_model).items():
        torch.testing.assert_close(value, weights(torch_model)[name], rtol=1e-6, atol=1e-9)
        assert torch.equal(value, before[name]) is (name == "frozen")


def steps_of(optimizer_class, dtype, n=40, lr=1e-5):
    """Returns a weight matrix of a model's usual size before and after `n` steps along one noisy direction, and the
    optimizer's state.
    """
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
    """The 16-bit weight is rounded at every step; moments are float32 as with masters."""
    own_model, reference = MixedParameters(dtype), MixedParameters(dtype)
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
    monkeypatch.setattr(MasterWeightAdamW, "AT_ONCE", 1000)
    _, sliced, sliced_state = steps_of(make, dtype, n=3)
    assert torch.equal(whole, sliced)
    assert all(torch.equal(value, sliced_state[name]) for name, value in state.items())


def test_a_parameter_without_a_gradient_stays():
    model = MixedParameters(torch.bfloat16)
    optimizer = MasterWeightAdamW(parameter_groups(model, 0.5), lr=0.1)
    model.matrix.grad = torch.ones_like(model.matrix)
    optimizer.step()
    before = weights(MixedParameters(torch.bfloat16))
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert changed == {"matrix"}


def test_small_parameters_share_a_launch_and_large_ones_are_sliced(monkeypatch):
    """And every weight is stepped once, whatever the sizes; temporaries are those of AT_ONCE weights."""
    sizes = []

    def recorded(parameters, grads, *args, **options):
        assert options["fused"] and all(grad.dtype == torch.float32 for grad in grads)
        sizes.append([len(parameter) for parameter in parameters])

    monkeypatch.setattr(MasterWeightAdamW, "AT_ONCE", 10)
    monkeypatch.setattr("distillation.adamw.adamw", recorded)
    parameters = [torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16)) for n in (3, 4, 2, 25, 5, 5, 1)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    MasterWeightAdamW(parameters).step()
    assert sizes == [[3, 4, 2], [10], [10], [5, 5], [5, 1]]
