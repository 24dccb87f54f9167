"""Gradients of the micro steps of an optimizer step, summed in float32."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distillation.gradient_sums import GradientSums, needs_sums
from tests.parsing import train_options
from tests.two_ranks import on_two_ranks

N_MICRO_STEPS = 16


def model_and_inputs(seed=0):
    """Returns a model in bfloat16 with a matrix that is used twice, and the inputs of an optimizer step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).to(torch.bfloat16)
    model[2].weight = model[0].weight
    generator = torch.Generator().manual_seed(seed)
    return model, torch.randn(N_MICRO_STEPS, 4, 8, generator=generator).to(torch.bfloat16)


def exact_sums(model, inputs):
    """Returns the sums of the micro steps' own gradients, by name, in float64."""
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for x in inputs:
        model.zero_grad()
        model(x).float().square().sum().backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad
    model.zero_grad()
    return sums


def error(model, sums):
    got = torch.cat([p.grad.double().flatten() for p in model.parameters()])
    exact = torch.cat([total.flatten() for total in sums.values()])
    return ((got - exact).norm() / exact.norm()).item()


def add_up(model, inputs, sums):
    for i, x in enumerate(inputs):
        if sums is not None:
            sums.begin(is_last=i == len(inputs) - 1)
        model(x).float().square().sum().backward()


def with_zero_gradients(model):
    places = {}
    for name, parameter in model.named_parameters():
        parameter.grad = places[name] = torch.zeros_like(parameter)
    return places


def test_a_sum_of_micro_steps_is_rounded_once():
    model, inputs = model_and_inputs()
    exact = exact_sums(model, inputs)
    with_zero_gradients(model)
    add_up(model, inputs, None)
    in_bfloat16 = error(model, exact)

    places = with_zero_gradients(model)
    sums = GradientSums(model.parameters())
    for _ in range(2):  # a second optimizer step finds nothing of the first
        for place in places.values():
            place.zero_()
        add_up(model, inputs, sums)
        for name, parameter in model.named_parameters():
            assert parameter.grad is places[name], name
            assert torch.equal(parameter.grad, exact[name].float().to(torch.bfloat16)), name
    assert error(model, exact) < 0.002 < in_bfloat16  # 2 ** -9 of each element at most


def test_no_gradient_is_kept_between_micro_steps():
    model, inputs = model_and_inputs()
    with_zero_gradients(model)
    sums = GradientSums(model.parameters())
    add_up(model, inputs[:1], None)
    before = model[0].weight.grad.clone()
    model.zero_grad(set_to_none=False)
    sums.begin(is_last=False)
    model(inputs[0]).float().square().sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(sums.sums[model[0].weight], before.float())


def ddp_gradients(ranks):
    """Returns this rank's own exact sums, and the gradients that DDP has averaged in two optimizer steps."""
    model, inputs = model_and_inputs(seed=ranks.rank)
    exact = exact_sums(model, inputs)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for _ in range(2):  # DDP arranges its buckets
        ddp(inputs[0]).float().sum().mul(0).backward()
    model.zero_grad(set_to_none=False)
    sums, found, places = GradientSums(model.parameters()), [], []
    for _ in range(2):
        for i, x in enumerate(inputs):
            sums.begin(is_last=i == len(inputs) - 1)
            ddp.require_backward_grad_sync = sums.is_last
            ddp(x).float().square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        places.append([p.grad.data_ptr() for p in model.parameters()])
        model.zero_grad(set_to_none=False)
    return exact, found, places


def test_ranks_average_sums_of_micro_steps(tmp_path):
    (one, found, places), (other, found_there, _) = on_two_ranks(ddp_gradients, tmp_path)
    assert places[0] == places[1]  # still DDP's buckets
    for step in range(2):
        for name, average in found[step].items():
            halves = [exact[name].float().to(torch.bfloat16) / 2 for exact in (one, other)]
            assert torch.equal(average, halves[0] + halves[1]), name
            assert torch.equal(average, found_there[step][name])


@pytest.mark.parametrize(
    "options,expected",
    [
        ("--grad_accumulation_steps 4 --dtype bfloat16", True),
        ("--grad_accumulation_steps 4 --dtype float16", True),
        ("--grad_accumulation_steps 4 --dtype float32", False),
        ("--grad_accumulation_steps 1 --dtype bfloat16", False),
        ("--grad_accumulation_steps 4 --dtype bfloat16 --grad_accumulation_dtype weights", False),
    ],
)
def test_who_needs_sums(options, expected):
    assert needs_sums(train_options(options)) == expected
