"""Sums of the gradients of an optimizer step's micro steps, in float32 where gradients have 16 bits. Added up in
bfloat16, a gradient loses as many of its 8 bits as the sum so far is larger than itself: of 16 micro steps, up to 4.
"""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from arguments import TrainArguments


def needs_sums(args: TrainArguments) -> bool:
    """Returns whether a run sums up gradients of 16 bits, and is not asked to do so in their own dtype."""
    has_several = args.grad_accumulation_steps > 1
    return has_several and args.dtype != "float32" and args.grad_accumulation_dtype == "float32"


class GradientSums:
    """Adds up the gradients of `parameters` in float32; `begin` is called before every backward pass. In the last one
    of an optimizer step each parameter's `grad` becomes the whole sum, rounded once, where it was kept before: in a
    bucket of DDP, or a part of a larger tensor. Until then it is None.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.sums = {parameter: torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters}
        self.places: dict[nn.Parameter, Tensor | None] = {}
        self.is_last = True
        for parameter in self.sums:
            parameter.register_hook(functools.partial(self._with_sum, parameter))
            parameter.register_post_accumulate_grad_hook(self._take)

    def begin(self, is_last: bool) -> None:
        """Prepares for the backward pass of a micro step. All `grad` are zeros when a new optimizer step begins."""
        self.is_last = is_last
        if not is_last and not self.places:
            self.places = {parameter: parameter.grad for parameter in self.sums}
            for parameter in self.sums:
                parameter.grad = None  # backward then leaves its own tensor there, and adds nothing up
        elif is_last:
            for parameter, place in self.places.items():
                parameter.grad = place
            self.places = {}

    def _with_sum(self, parameter: nn.Parameter, grad: Tensor) -> Tensor | None:
        """Runs before a gradient is put to its place. Returns what is put there instead; None leaves it as it is."""
        if not self.is_last:
            return None
        whole = self.sums[parameter].add_(grad).to(grad.dtype)
        self.sums[parameter].zero_()
        return whole

    def _take(self, parameter: Tensor) -> None:
        """Runs when a parameter has its gradient."""
        if not self.is_last:
            assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
            self.sums[parameter].add_(parameter.grad)
            parameter.grad = None
