"""What ranks send each other for an optimizer step: the bytes that a rank receives, and how long these take on their
link.

Each `--gradient_exchange` is a function here that returns its `Traffic`.
"""

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


def traffic_of(args: TrainArguments, student: LlambaForCausalLM, n_ranks: int, rate: float) -> Traffic:
    """Returns the traffic of the exchange that the options name. rate: bytes per second that a rank's link carries."""
    if args.gradient_exchange == "owners":
        return to_owners(args, student, n_ranks, rate)
    return all_reduce_and_broadcasts(student, n_ranks, rate)


def to_owners(args: TrainArguments, student: LlambaForCausalLM, n_ranks: int, rate: float) -> Traffic:
    """Returns the traffic of `distillation.owners`: a rank receives its own piece of the others' gradients, the rows
    of the embedding that their tokens have, and what has changed in the pieces that are not its own.
    """
    if n_ranks == 1:
        return NOTHING
    others, trained, embedding = (n_ranks - 1) / n_ranks, gradient_bytes(student), sparse_embedding(student)
    in_buckets, in_rows = trained, 0.0
    if embedding is not None:
        tokens = args.grad_accumulation_steps * args.batch_size * args.seq_length
        in_buckets, in_rows = trained - embedding.nbytes, min(tokens / len(embedding), 1) * embedding.nbytes
    itemsize, coded = student.lm_head.weight.element_size(), 1.0
    if args.gradient_bits != 16:
        coded = (args.gradient_bits / 8 + 2 / BlockIntegers(args.gradient_bits).block) / itemsize
    gradients, rows = others * coded * in_buckets, others * in_rows
    weights = others * trained * (CHANGED if itemsize == 2 else 1)
    received = {"gradients": round(gradients), "rows of the embedding": round(rows), "changed weights": round(weights)}
    last = min(others * coded * BUCKET_BYTES, gradients) + rows
    return Traffic(received, (gradients + rows) / rate, last / rate, weights / rate)


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
