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
from llamba import LlambaForCausalLM
from model_utils import DTYPES
from preflight.live_memory import LiveMemory
from training_utils import parameter_groups, sparse_embedding

NORM_AND_CLEARING = 2  # passes over gradients in an update


class OptimizerFootprint(NamedTuple):
    """Holds the optimizer's bytes on the rank with the largest shard."""

    kept: int  # from step to step
    work: int  # what a step takes besides
    moved: int  # what a step reads and writes
    arrived: int = 0  # gradients that other ranks have sent, from backward to the step
    in_flight: int = 0  # of an exchange in the backward pass: messages under way, and what their coding takes
    full_after: float = 1.0  # the part of the backward pass after which so much is under way


def n_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def gradient_bytes(student: nn.Module) -> int:
    """Returns the bytes in which gradients are kept, such as DDP's buckets."""
    return n_bytes(p for p in student.parameters() if p.requires_grad)


def bytes_of_sums(student: nn.Module) -> int:
    """Returns the bytes of the float32 sums of gradients."""
    return sum(4 * p.numel() for p in student.parameters() if p.requires_grad)


def optimizer_footprint(student: LlambaForCausalLM, args: TrainArguments, n_ranks: int) -> OptimizerFootprint:
    """Measures an optimizer step; gradients are those of all ranks, and the norm is of all of them."""
    if args.gradient_exchange == "owners":
        return owners_footprint(student, args, n_ranks)
    shard = max(shards(parameter_groups(student, args.weight_decay, args.copied_lr_factor), n_ranks), key=n_bytes)
    measured = _measure_optimizer(shard, args.master_weights)
    return measured._replace(moved=measured.moved + NORM_AND_CLEARING * gradient_bytes(student))


def owners_footprint(student: LlambaForCausalLM, args: TrainArguments, n_ranks: int) -> OptimizerFootprint:
    """Measures an optimizer step on an equal piece of all trained weights, in float32, with the coding of what is sent;
    and the gradients that are under way at most.
    """
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    piece = nn.Parameter(torch.empty(sum(p.numel() for p in trained) // n_ranks, device="meta"))
    measured = _measure_optimizer([piece], master_weights=True)
    masters = 0 if trained[0].dtype == torch.float32 else piece.nbytes
    moved = measured.moved + NORM_AND_CLEARING * gradient_bytes(student)
    step = OptimizerFootprint(measured.kept + masters, measured.work, moved, piece.nbytes)
    if n_ranks == 1:
        return step
    embedding, all_bytes = sparse_embedding(student), gradient_bytes(student)
    by_rows = 0 if embedding is None else embedding.nbytes
    in_buckets = max(all_bytes - by_rows, 1)
    # Weights of a piece that are coded at once, of the largest bucket.
    at_once = min(BUCKET_BYTES, max(in_buckets, by_rows)) // trained[0].element_size() // n_ranks
    coding = measure_coding(piece.numel(), args, n_ranks)
    sent_at_once, in_flight = (min(n * BUCKET_BYTES, in_buckets) / trained[0].element_size() for n in (1, IN_FLIGHT))
    return step._replace(
        work=max(measured.work, round(coding.of_changes * at_once)),
        moved=moved + coding.moved,
        in_flight=round(2 * coding.message * in_flight + coding.of_gradients * sent_at_once),
        full_after=min(IN_FLIGHT * BUCKET_BYTES / in_buckets, 1.0),
    )


class Coding(NamedTuple):
    """Holds what the coding of an exchange takes, in bytes: in all, and for each weight that is coded at once."""

    moved: int  # read and written in a step
    message: float  # of a gradient on its way
    of_gradients: float  # memory, while one is encoded
    of_changes: float  # while what an update has changed is encoded, or decoded


def measure_coding(n: int, args: TrainArguments, n_ranks: int) -> Coding:
    """Measures the coding of what is sent for pieces of n weights, operation by operation: gradients for all ranks and
    from all, and, of 16-bit weights, changes of its own piece and of all.
    """
    n, dtype = max(n // WHOLE, 1) * WHOLE, DTYPES[args.dtype]
    code = gradient_code(args.gradient_bits, dtype)
    old, total = torch.empty(n, dtype=dtype, device="meta"), torch.empty(n, device="meta")
    with LiveMemory([old, total]) as of_gradients:
        message = code.encode(old[None])[0]
        encoding = of_gradients.peak
        total += code.decode(message)
    moved = n_ranks * of_gradients.moved.total()
    if dtype == torch.float32:
        return Coding(moved, message.nbytes / n, encoding / n, n_ranks * old.element_size())
    with LiveMemory([old, total]) as of_own:
        count_longer(old, total.to(dtype))
        codes, longer = encode_changes(old, total.to(dtype), n // 32)  # 3 %, as the prototype found at most
    with LiveMemory([old, codes, longer]) as of_each:
        apply_changes(old, codes, longer)
    moved += of_own.moved.total() + n_ranks * of_each.moved.total()
    of_changes = max(of_own.peak, n_ranks * (codes.nbytes + longer.nbytes) + of_each.peak)
    return Coding(moved, message.nbytes / n, encoding / n, of_changes / n)


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
