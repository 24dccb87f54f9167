"""AdamW on float32 masters."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class MasterWeightAdamW(torch.optim.Optimizer):
    """Steps AdamW (arXiv 1711.05101) on float32 master weights and moments, whatever the parameters' dtype.

    In bfloat16 most updates of lr 1e-5 are below the weights' resolution and would be lost; the masters keep
    them. For float32 parameters, and where `master_weights` is off, the parameter is its own master. Gradients are
    multiplied by their group's `grad_factor`, in float32 too: unscaled in float16, small ones would vanish.
    """

    AT_ONCE = 2**24  # weights stepped at once

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        master_weights: bool = True,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, grad_factor=1.0))
        self.master_weights = master_weights

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for pieces in self._pieces(group["params"]):
                _step_pieces(pieces, group)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["step"] += 1

    def _pieces(self, parameters: Iterable[Tensor]) -> Iterator[list["Piece"]]:
        """Yields lists of pieces with at most AT_ONCE weights together. The float32 gradients of a list are then of
        that size, where a vocabulary's alone would take gigabytes; and the many small parameters share one launch.
        """
        pieces: list[Piece] = []
        n_weights = 0
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state_of(parameter)
            tensors = (parameter, state.get("master", parameter), parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            slices = zip(*(tensor.view(-1).split(self.AT_ONCE) for tensor in tensors), strict=True)
            for weight, master, grad, exp_avg, exp_avg_sq in slices:
                if n_weights + len(weight) > self.AT_ONCE:
                    yield pieces
                    pieces, n_weights = [], 0
                pieces.append(Piece(weight, master, grad, exp_avg, exp_avg_sq, state["step"]))
                n_weights += len(weight)
        if pieces:
            yield pieces

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Returns what is kept for a parameter, made here if it is not there yet."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            if self.master_weights and parameter.dtype != torch.float32:
                state["master"] = parameter.detach().float()
        return state


class Piece(NamedTuple):
    """Holds a part of a parameter and of what AdamW keeps for it, (n,) each, and its steps so far, on the CPU."""

    weight: Tensor
    master: Tensor  # the weight itself where it has none
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


def _step_pieces(pieces: list[Piece], group: dict) -> None:
    """Steps AdamW by torch's fused kernel, which takes float32 weights and gradients."""
    stepped = [piece.master.float() for piece in pieces]  # itself, but for a 16-bit parameter without a master
    grads = [piece.grad.to(torch.float32, copy=True) for piece in pieces]
    torch._foreach_mul_(grads, group["grad_factor"])
    adamw(
        stepped,
        grads,
        [piece.exp_avg for piece in pieces],
        [piece.exp_avg_sq for piece in pieces],
        [],
        [torch.full((), piece.step.item(), device=piece.weight.device) for piece in pieces],  # counted by the kernel
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    rounded = [pair for pair in zip(pieces, stepped, strict=True) if pair[0].weight.dtype != pair[1].dtype]
    if rounded:
        torch._foreach_copy_([piece.weight for piece, _ in rounded], [new for _, new in rounded])
