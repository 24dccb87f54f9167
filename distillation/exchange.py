"""How gradients of all ranks become an update of everybody's weights: what an exchange does, and the one in which all
ranks average all gradients.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer


@dataclass(frozen=True)
class Owned:
    """Names weights whose masters and moments this rank keeps: `size` of a flattened parameter, from `start` on."""

    parameter: nn.Parameter
    start: int
    size: int


# By kind ("master", "exp_avg", "exp_avg_sq"): the numbers (size,) that are kept for owned weights; "step" is a scalar.
Kept = dict[str, Tensor]


class Exchange(Protocol):
    """Steps an optimizer on the gradients of all ranks. `begin` comes before each backward pass; after the last one of
    an optimizer step come `norm`, `step` if the update is to be made, and `clear`.
    """

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Returns the optimizer, whose groups a schedule sets."""
        ...

    @property
    def master_weights(self) -> bool: ...

    def begin(self, is_last: bool) -> None: ...

    def norm(self) -> float:
        """Returns the L2 norm of the gradients' mean over ranks, the same on all."""
        ...

    def step(self, factor: float) -> None:
        """Updates the weights by the gradients times `factor`."""
        ...

    def clear(self) -> None: ...

    def owned(self) -> Iterator[tuple[Owned, Kept]]:
        """Yields which weights this rank owns, and what is kept for them: nothing before the first update."""
        ...

    def restore(self, read: Callable[[Owned, str], Tensor]) -> None:
        """Replaces what is kept by what `read` returns for owned weights and a kind."""
        ...


class AllReduce:
    """Steps an optimizer on gradients that the ranks have averaged in the backward pass (DDP in distillation,
    `LayerGradients` in an alignment). ZeroRedundancyOptimizer keeps whole parameters, each on one rank, and sends their
    new weights to the others.
    """

    def __init__(self, model: nn.Module, optimizer: ZeroRedundancyOptimizer) -> None:
        self.model, self.optimizer = model, optimizer

    @property
    def master_weights(self) -> bool:
        return self.optimizer.optim.master_weights

    def begin(self, is_last: bool) -> None:
        pass

    def norm(self) -> float:
        return gradient_norm(self.model).item()

    def step(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["grad_factor"] = factor
        self.optimizer.step()

    def clear(self) -> None:
        # Kept as zeros: a gradient that is None gathers outside DDP's buckets until micro steps are summed up.
        self.optimizer.zero_grad(set_to_none=False)

    def owned(self) -> Iterator[tuple[Owned, Kept]]:
        for parameter in self._parameters():
            state = self.optimizer.optim.state.get(parameter, {})
            kept = {kind: value.view(-1) if kind != "step" else value for kind, value in state.items()}
            yield Owned(parameter, 0, parameter.numel()), kept

    def restore(self, read: Callable[[Owned, str], Tensor]) -> None:
        for parameter in self._parameters():
            state = self.optimizer.optim.state_of(parameter)
            for kind, value in state.items():
                value.copy_(read(Owned(parameter, 0, parameter.numel()), kind).view_as(value))

    def _parameters(self) -> Iterator[nn.Parameter]:
        return itertools.chain.from_iterable(group["params"] for group in self.optimizer.optim.param_groups)


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """Returns the L2 norm of all gradients, a scalar tensor in float32 whatever their dtype."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)))


@torch.no_grad()
def take_weights_of_rank_0(model: nn.Module) -> None:
    """Makes all ranks begin with rank 0's model, as DDP does by itself. Called by all ranks."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        dist.broadcast(tensor, src=0)
