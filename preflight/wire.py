"""What ranks send each other for an optimizer step: the bytes that a rank receives, and how long these take on their
link.

Each `--gradient_exchange` is a function here that returns its `Traffic`.
"""

from collections.abc import Iterator
from typing import NamedTuple

from arguments import TrainArguments
from distillation.gradient_codes import BlockIntegers
from distillation.owners import BUCKET_BYTES
from llamba import LlambaForCausalLM
from preflight.live_memory import Items
from preflight.update_footprint import gradient_bytes
from training_utils import sparse_embedding


class Traffic(NamedTuple):
    """Holds the bytes that a rank receives in an optimizer step, by purpose, and the seconds that they take."""

    received: Items
    gradients: float  # from the last micro step's backward pass on, behind which they can hide
    last_gradients: float  # of them, those that are there only at its end
    weights: float  # after the update: nothing hides them

    def exposed(self, backward: float) -> float:
        """Returns the seconds that a backward pass of so many does not hide."""
        return max(self.gradients - backward, self.last_gradients) + self.weights


NOTHING = Traffic({}, 0.0, 0.0, 0.0)
# Of the bytes of 16-bit weights: what an update changes in them, coded. 2 bits for each, and the 1 to 3 % that moved
# further than by one step of their dtype: estimated, from what a prototype found at learning rates like production's.
CHANGED = 0.14


class Seats(NamedTuple):
    """Says how many ranks there are, and what links carry, in bytes per second: one of a rank to the others; or, with
    several nodes, one of a node, which its ranks share, and of a rank to others of its node (None: the same).
    """

    n_ranks: int
    rate: float
    n_nodes: int = 1
    inside_rate: float | None = None


def traffic_of(args: TrainArguments, student: LlambaForCausalLM, seats: Seats) -> Traffic:
    """Returns the traffic of the exchange that the options name."""
    if args.gradient_exchange == "owners":
        return to_owners(args, student, seats)
    return all_reduce_and_broadcasts(student, seats.n_ranks, seats.rate)


class Hop(NamedTuple):
    """Holds one of `distillation.levels`: `size` ranks exchange on a link that `sharers` ranks share. Gradients take
    `coded` of their bytes there.
    """

    size: int
    sharers: int
    rate: float
    coded: float


def hops(args: TrainArguments, itemsize: int, seats: Seats) -> Iterator[Hop]:
    """Yields the levels in the order in which gradients pass them."""
    coded, n_local = 1.0, seats.n_ranks // seats.n_nodes
    if args.gradient_bits != 16:
        coded = (args.gradient_bits / 8 + 2 / BlockIntegers(args.gradient_bits).block) / itemsize
    if 1 in (n_local, seats.n_nodes):
        yield Hop(seats.n_ranks, 1, seats.rate, coded)
        return
    yield Hop(n_local, 1, seats.inside_rate or seats.rate, 1.0)
    yield Hop(seats.n_nodes, n_local, seats.rate, coded)


def to_owners(args: TrainArguments, student: LlambaForCausalLM, seats: Seats) -> Traffic:
    """Returns the traffic of `distillation.owners`: a rank receives its own piece of the others' gradients, the rows
    of the embedding that their tokens have, and what has changed in the pieces that are not its own. On several nodes
    a node receives these once for all of its ranks. Levels are taken to follow each other.
    """
    if seats.n_ranks == 1:
        return NOTHING
    trained, embedding = gradient_bytes(student), sparse_embedding(student)
    in_buckets = trained if embedding is None else trained - embedding.nbytes
    itemsize = student.lm_head.weight.element_size()
    tokens = args.grad_accumulation_steps * args.batch_size * args.seq_length
    received: Items = {"gradients": 0, "rows of the embedding": 0, "changed weights": 0}
    gradients_s = last_s = weights_s = 0.0
    for hop in hops(args, itemsize, seats):
        others = (hop.size - 1) / hop.size
        rows = 0.0
        if embedding is not None:
            rows = others * min(hop.sharers * tokens / len(embedding), 1) * embedding.nbytes
        gradients = others * hop.coded * in_buckets
        weights = others * trained * (CHANGED if itemsize == 2 else 1)
        for name, size in zip(received, (gradients, rows, weights), strict=True):
            received[name] += round(size / hop.sharers)
        gradients_s += (gradients + rows) / hop.rate
        last_s += (min(others * hop.coded * BUCKET_BYTES, gradients) + rows) / hop.rate
        weights_s += weights / hop.rate
    return Traffic(received, gradients_s, last_s, weights_s)


def all_reduce_and_broadcasts(student: LlambaForCausalLM, n_ranks: int, rate: float) -> Traffic:
    """Returns the traffic of DDP's all-reduce of gradients and ZeroRedundancyOptimizer's broadcasts of weights.

    In a ring a rank receives all gradients but its own part, twice, and sends as it receives. Broadcasts come one after
    another: in each, all bytes pass every link but the root's, whose own receiving side is idle. So together they take
    as long as all weights, although a rank receives those of others alone.
    """
    if n_ranks == 1:
        return NOTHING
    trained, others = gradient_bytes(student), (n_ranks - 1) / n_ranks
    received = {"gradients": round(2 * others * trained), "updated weights": round(others * trained)}
    embedding = student.backbone.embedding.weight  # the first in forward is the last in backward
    last = 2 * others * embedding.nbytes if embedding.requires_grad else 0
    return Traffic(received, received["gradients"] / rate, last / rate, trained / rate)
