"""The update that follows the backward passes of an optimizer step, and the loss scale of float16."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from distillation.exchange import Exchange

# Of an update: made; skipped because float16 overflowed; skipped because loss or gradient is not finite.
Outcome = Literal["stepped", "overflow", "bad"]


@dataclass
class LossScale:
    """Keeps float16 gradients from vanishing by a factor that is halved when they overflow and doubled after
    `growth_interval` good steps. For other dtypes it stays 1.
    """

    active: bool
    value: float
    good_steps: int = 0
    growth_interval: int = 1000

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> "LossScale":
        return cls(True, 2.0**14) if dtype == torch.float16 else cls(False, 1.0)

    def update(self, overflowed: bool) -> None:
        if not self.active:
            return
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps % self.growth_interval == 0:
            self.value *= 2


def step_or_skip(exchange: Exchange, loss_scale: LossScale, grad_clip: float, loss: float) -> tuple[float, Outcome]:
    """Unscales, clips, steps and clears the gradients. Returns the gradient norm before clipping, and the outcome.

    Loss (the mean of all ranks) and norm are the same on all ranks, so that all skip the same updates without talking
    to each other. An update is skipped if one of them is not finite: it is an "overflow" if float16's scale can be the
    cause, else "bad".
    """
    norm = exchange.norm() / loss_scale.value
    outcome: Outcome = "stepped"
    if not math.isfinite(loss) or not math.isfinite(norm):
        outcome = "overflow" if math.isfinite(loss) and loss_scale.value > 1 else "bad"
    else:
        factor = 1.0 / loss_scale.value
        if grad_clip and norm > grad_clip:
            factor *= grad_clip / norm
        exchange.step(factor)
    loss_scale.update(overflowed=outcome == "overflow")
    exchange.clear()
    return norm, outcome
