"""Measures what gradients and an update take, in bytes, on the meta device: what the optimizer keeps, what its step
takes besides, and what an exchange of gradients holds and codes.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from arguments import TrainArguments
from distillation.adamw import MasterWeightAdamW
from distillation.buckets import WHOLE
from distillation.changes import apply_changes, count_longer, encode_changes
from distillation.gradient_codes import gradient_code
from distillation.owners import BUCKET_BYTES, IN_FLIGHT
from model_utils import DTYPES
from preflight.live_memory import LiveMemory
from training_utils import parameter_groups

NORM_AND_CLEARING = 2  # passes over gradients in an update


class OptimizerFootprint(NamedTuple):
    """Holds the optimizer's bytes on the rank with the largest shard."""

    kept: int  # from step to step
    work: int  # what a step takes besides
    moved: int  # what a step reads and writes
    arrived: int = 0  # gradients that other ranks have sent, from backward to the step


def n_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def gradient_bytes(student: nn.Module) -> int:
    """Returns the bytes in which gradients are kept, such as DDP's buckets."""
    return n_bytes(p for p in student.parameters() if p.requires_grad)


def bytes_of_sums(student: nn.Module) -> int:
    """Returns the bytes of the float32 sums of gradients."""
    return sum(4 * p.numel() for p in student.parameters() if p.requires_grad)


def optimizer_footprint(student: nn.Module, args: TrainArguments, n_ranks: int) -> OptimizerFootprint:
    """Measures an optimizer step; gradients are those of all ranks, and the norm is of all of them."""
    if args.gradient_exchange == "owners":
        return owners_footprint(student, args, n_ranks)
    shard = max(shards(parameter_groups(student, args.weight_decay, args.copied_lr_factor), n_ranks), key=n_bytes)
    measured = _measure_optimizer(shard, args.master_weights)
    return measured._replace(moved=measured.moved + NORM_AND_CLEARING * gradient_bytes(student))


def owners_footprint(student: nn.Module, args: TrainArguments, n_ranks: int) -> OptimizerFootprint:
    """Measures an optimizer step on an equal piece of all trained weights, in float32, with the coding of what is sent;
    and the gradients that are under way at most.
    """
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    piece = nn.Parameter(torch.empty(sum(p.numel() for p in trained) // n_ranks, device="meta"))
    measured = _measure_optimizer([piece], master_weights=True)
    masters = 0 if trained[0].dtype == torch.float32 else piece.nbytes
    moved = measured.moved + NORM_AND_CLEARING * gradient_bytes(student)
    arrived = piece.nbytes
    if n_ranks > 1:
        moved += coding_bytes(piece.numel(), args, n_ranks)
        arrived += min(2 * IN_FLIGHT * BUCKET_BYTES, 2 * gradient_bytes(student))
    return OptimizerFootprint(measured.kept + masters, measured.work, moved, arrived)


def coding_bytes(n: int, args: TrainArguments, n_ranks: int) -> int:
    """Returns the bytes that a rank reads and writes to code and decode what is sent for pieces of n weights, operation
    by operation: gradients for all ranks and from all, and, of 16-bit weights, changes of its own piece and of all.
    """
    n, dtype = n // WHOLE * WHOLE, DTYPES[args.dtype]
    code = gradient_code(args.gradient_bits, dtype)
    old, total = torch.empty(n, dtype=dtype, device="meta"), torch.empty(n, device="meta")
    with LiveMemory([old, total]) as of_each:
        total += code.decode(code.encode(old[None])[0])
    moved = n_ranks * of_each.moved.total()
    if dtype != torch.float32:
        with LiveMemory([old, total]) as of_own:
            count_longer(old, total.to(dtype))
            codes, longer = encode_changes(old, total.to(dtype), n // 32)  # 3 %, as the prototype found at most
        with LiveMemory([old, codes, longer]) as of_each:
            apply_changes(old, codes, longer)
        moved += of_own.moved.total() + n_ranks * of_each.moved.total()
    return moved


def _measure_optimizer(shard: list[nn.Parameter], master_weights: bool) -> OptimizerFootprint:
    for parameter in shard:
        parameter.grad = torch.empty_like(parameter)
    memory = LiveMemory([*shard, *(p.grad for p in shard if p.grad is not None)])
    optimizer = MasterWeightAdamW(shard, master_weights=master_weights)
    with memory:
        optimizer.step()  # makes the state
        kept = memory.total
        memory.restart_peak()
        memory.moved.clear()
        optimizer.step()
    for parameter in shard:
        parameter.grad = None
    return OptimizerFootprint(kept, memory.peak - kept, memory.moved.total())


def shards(groups: list[dict], n_ranks: int) -> list[list[nn.Parameter]]:
    """Returns the parameters by rank as ZeroRedundancyOptimizer distributes them: the largest first, each to the rank
    that has least.
    """
    dealt: list[list[nn.Parameter]] = [[] for _ in range(n_ranks)]
    sizes = [0] * n_ranks
    for group in groups:
        for parameter in sorted(group["params"], key=Tensor.numel, reverse=True):
            rank = sizes.index(min(sizes))
            dealt[rank].append(parameter)
            sizes[rank] += parameter.numel()
    return dealt
