"""What uses the numbers of a run, with each at its least and its largest value: no overflow, and finite losses."""

import dataclasses
import typing
from collections import Counter

import numpy as np
import pytest
import torch

from arguments import TrainArguments, parse_train_args
from checkpointing.run_folder import disk_room
from data import WindowOrder
from distillation.fused_loss import LossInputs, fused_distill_loss
from distillation.losses import LossWeights, compute_distill_loss
from inputs.options import kind_of, options_of
from processes.exits import StopRequest
from tests.tiny import tiny_student
from training_utils import build_schedule
from utils import format_duration

ABOUT = options_of(TrainArguments)
TYPES = typing.get_type_hints(TrainArguments)
NUMBERS = [name for name in ABOUT if kind_of(TYPES[name])[0] in (int, float) and name != "layers"]
TINIEST = 5e-324  # the smallest number above 0


def least(name):
    return TINIEST if ABOUT[name].least is None else ABOUT[name].least


def options_at(side):
    """Returns the options of a run whose numbers are all at their least or largest values."""
    values = {name: ABOUT[name].most if side == "most" else least(name) for name in NUMBERS}
    return dataclasses.replace(parse_train_args(["--preset", "tiny"]), **values)


@pytest.mark.parametrize("temperature", [least("temperature"), ABOUT["temperature"].most])
@pytest.mark.parametrize("weight", [TINIEST, ABOUT["kl_weight"].most])
def test_losses_and_gradients_are_finite(temperature, weight):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (100 * torch.randn(1, 4, 32, generator=generator) for _ in range(2))
    labels, mask = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)
    logits.requires_grad_()
    total, *_ = compute_distill_loss(logits, teacher, labels, mask, weight, weight, temperature)
    total.backward()
    assert total.isfinite() and logits.grad.isfinite().all()

    head = torch.eye(32).requires_grad_()
    inputs = LossInputs(logits.detach(), head, None, teacher, None, labels, mask, 32)
    fused, *_ = fused_distill_loss(inputs, LossWeights(weight, weight, temperature), 2)
    fused.backward()
    torch.testing.assert_close(fused, total.detach())
    assert head.grad.isfinite().all()


@pytest.mark.parametrize("side", ["least", "most"])
def test_the_parts_of_a_run(side, tmp_path):
    args = options_at(side)
    steps = args.max_steps * args.grad_accumulation_steps
    for lr in ((args.max_lr, args.min_lr), (TINIEST, TINIEST), (args.max_lr, 0.0)):
        args.max_lr, args.min_lr = lr
        optimizer = torch.optim.AdamW([torch.zeros(2, requires_grad=True)], lr=args.max_lr)
        for done in (0, args.max_steps - 1, args.max_steps):
            build_schedule(optimizer, args, args.max_steps, done)
            assert 0 <= optimizer.param_groups[0]["lr"] <= args.max_lr
    torch.manual_seed(args.seed)
    np.random.default_rng([args.seed, args.epochs])
    n_windows = 10**9
    order = WindowOrder(n_windows, args.epochs, 1, 0, 1, args.seed)
    assert len(order) == n_windows * args.epochs
    assert StopRequest(args.time_limit).deadline > 0
    assert format_duration(60 * args.time_limit) and format_duration(steps / args.tflops)
    args.output_dir = str(tmp_path)
    assert disk_room(args, tiny_student(), steps).n_most > 0


@pytest.mark.parametrize("side", ["least", "most"])
def test_the_windows_of_an_epoch_with_any_seed(side):
    order = WindowOrder(8, 2, 2, 0, 1, options_at(side).seed)
    drawn = Counter(window for step in order for window in step)
    assert drawn == dict.fromkeys(range(8), 2)
