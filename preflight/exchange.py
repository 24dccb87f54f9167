"""What ranks send each other for an optimizer step: the bytes that a rank receives, and how long these take on their
link.

A way to exchange gradients is a function here that returns an `Exchange`. Today there is one: DDP and
ZeroRedundancyOptimizer.
"""

from typing import NamedTuple

from llamba import LlambaForCausalLM
from preflight.footprint import gradient_bytes
from preflight.live_memory import Items


class Exchange(NamedTuple):
    """Holds the bytes that a rank receives in an optimizer step, by purpose, and the seconds that they take."""

    received: Items
    gradients: float  # from the last micro step's backward pass on, behind which they can hide
    last_gradients: float  # of them, those that are there only at its end
    weights: float  # after the update: nothing hides them

    def exposed(self, backward: float) -> float:
        """Returns the seconds that a backward pass of so many does not hide."""
        return max(self.gradients - backward, self.last_gradients) + self.weights


NOTHING = Exchange({}, 0.0, 0.0, 0.0)


def all_reduce_and_broadcasts(student: LlambaForCausalLM, n_ranks: int, rate: float) -> Exchange:
    """Returns the exchange by DDP's all-reduce of gradients and ZeroRedundancyOptimizer's broadcasts of weights.

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
    return Exchange(received, received["gradients"] / rate, last / rate, trained / rate)
