"""The levels at which ranks exchange: all of one node with each other; of several nodes first those of a node, then
those of the same local number, one of each node. What is summed or collected inside a node passes the slower links
between nodes once for the node, and not once for each of its ranks.

Gradients (R, k) are those of the pieces of all R ranks in order, node after node. At a level of S ranks, the one with
number s there receives what is for ranks whose number is s; the mean of it is (R / S, k), and (1, k) after the last
level. Weights go the other way round, from the last level to the first.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distillation.gradient_codes import Exact, GradientCode, gradient_code
from processes.ranks import TIMEOUT

# Of the same size, to ask whether any bit is set.
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Flight(NamedTuple):
    """Holds numbers that are under way between the ranks of a level."""

    sent: Tensor  # (S, m) uint8, kept until it has gone
    arrived: Tensor  # likewise, by the rank that sent it
    work: dist.Work


class Level(NamedTuple):
    """Exchanges between the ranks of a group, `size` of them; None: all ranks. code, dtype: in which gradients travel
    there.
    """

    group: dist.ProcessGroup | None
    size: int
    code: GradientCode
    dtype: torch.dtype

    def send(self, pieces: Tensor) -> Flight:
        """Starts to send pieces (R', k) to those who sum them."""
        message = self.code.encode(self._by_receiver(pieces).reshape(self.size, -1).contiguous())  # (S, m)
        arrived = torch.empty_like(message)
        work = dist.all_to_all_single(arrived.view(-1), message.view(-1), group=self.group, async_op=True)
        return Flight(message, arrived, work)

    def receive(self, flight: Flight, mean: Tensor) -> None:
        """Waits for a flight, and writes the mean of what has arrived into `mean` (R' / S * k,), summed in float32 rank
        after rank.
        """
        flight.work.wait()
        mean.zero_()
        for message in flight.arrived:
            mean += self.code.decode(message)
        mean /= self.size

    def mean_of_rows(self, pieces: Tensor) -> Tensor:
        """Returns the mean (R' / S, k, D) in float32 of rows (R', k, D). Only those that are not zero are sent, with
        their numbers. The host waits for the device, because it has to know how many these are.
        """
        rows = self._by_receiver(pieces.to(self.dtype))  # (S, R' / S, k, D)
        has_value = rows.view(INTEGERS[rows.dtype]).ne(0).any(dim=-1).view(self.size, -1)  # (S, R' / S * k)
        counts = has_value.sum(dim=1)
        counts_here = torch.empty_like(counts)
        dist.all_to_all_single(counts_here, counts, group=self.group)
        sent, here = counts.tolist(), counts_here.tolist()
        numbers = has_value.nonzero()[:, 1].int()
        numbers_here = numbers.new_empty(sum(here))
        dist.all_to_all_single(numbers_here, numbers, here, sent, group=self.group)
        values, values_here = rows[has_value.view(rows.shape[:-1])], rows.new_empty(sum(here), rows.shape[-1])
        width = values.shape[-1] * values.element_size()
        bytes_here, bytes_sent = ([n * width for n in numbers_of] for numbers_of in (here, sent))
        dist.all_to_all_single(as_bytes(values_here), as_bytes(values), bytes_here, bytes_sent, group=self.group)
        mean = torch.zeros(has_value.shape[1], rows.shape[-1], dtype=torch.float32, device=rows.device)
        # Rank after rank, each with every row once at most: the order of a sum is always the same.
        for which, some in zip(numbers_here.split(here), values_here.split(here), strict=True):
            mean.index_add_(0, which, some.float())
        return mean.div_(self.size).view(rows.shape[1:])

    def gather(self, pieces: Tensor) -> Tensor:
        """Returns the pieces (S R', m) of all ranks in order, each with its own (R', m)."""
        gathered = pieces.new_empty(self.size, *pieces.shape)  # (S, R', m)
        dist.all_gather_into_tensor(gathered.view(-1), pieces.reshape(-1), group=self.group)
        return gathered.transpose(0, 1).reshape(-1, pieces.shape[-1])  # (R' S, m)

    def _by_receiver(self, pieces: Tensor) -> Tensor:
        """Returns pieces (R', ...) by who receives them at this level, (S, R' / S, ...)."""
        return pieces.unflatten(0, (-1, self.size)).transpose(0, 1)


def make_levels(gradient_bits: int, dtype: torch.dtype, ranks_per_node: int) -> list[Level]:
    """Returns the levels in the order in which gradients pass them; called by all ranks. gradient_bits: at the last
    level, which is the slowest; inside a node gradients travel as they are.
    """
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    code, n_nodes = gradient_code(gradient_bits, dtype), n_ranks // ranks_per_node
    assert n_ranks == n_nodes * ranks_per_node, "`process_groups` refuses nodes of unequal size"
    if 1 in (n_nodes, ranks_per_node):
        return [Level(None, n_ranks, code, dtype)]
    # Every rank takes part in making every group.
    inside = [dist.new_group(range(n * ranks_per_node, (n + 1) * ranks_per_node), TIMEOUT) for n in range(n_nodes)]
    between = [dist.new_group(range(i, n_ranks, ranks_per_node), TIMEOUT) for i in range(ranks_per_node)]
    node, local_rank = divmod(rank, ranks_per_node)
    return [
        Level(inside[node], ranks_per_node, Exact(dtype), dtype),
        Level(between[local_rank], n_nodes, code, dtype),
    ]


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
