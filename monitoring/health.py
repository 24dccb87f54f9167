"""What goes wrong without an error: losses, of the model or of single layers, that jump, and weights that do not move
although they are trained.
"""

import logging
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distillation.exchange import Exchange, Owned
from llamba import LlambaForCausalLM
from llamba.parts import parameters_by_part
from monitoring.layer_errors import errors_by_layer, worst_layers
from processes.ranks import Ranks
from training_utils import Meter, Update

logger = logging.getLogger("train")


class SpikeWatch:
    """Finds losses, or errors of a layer, that stand out of the last ones: above their median by more than 6 standard
    deviations. These are estimated from the median distance to it, so that spikes themselves do not count.
    """

    WINDOW, LEAST, DEVIATIONS = 128, 32, 6.0

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=self.WINDOW)

    def is_spike(self, loss: float) -> bool:
        seen = list(self.losses)
        self.losses.append(loss)
        if len(seen) < self.LEAST:
            return False
        median = statistics.median(seen)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in seen)
        return loss - median > max(self.DEVIATIONS * deviation, 0.05 * abs(median))


class Spikes:
    """Watches the loss of a run and, in the stage `align`, the error of each layer: one that jumps among many hardly
    moves their mean.
    """

    def __init__(self) -> None:
        self.loss = SpikeWatch()
        self.layers: defaultdict[int, SpikeWatch] = defaultdict(SpikeWatch)

    def found_in(self, loss: float, errors: Mapping[int, float]) -> str:
        """Returns in words what stands out; nothing if all is as usual."""
        jumped = {layer: error for layer, error in errors.items() if self.layers[layer].is_spike(error)}
        found = [f"loss {loss:.4f}"] * self.loss.is_spike(loss)
        found += [f"the error of layers {worst_layers(jumped)}"] * bool(jumped)
        return " and ".join(found)


def warn_of_anomalies(step: int, update: Update, spikes: Spikes, meter: Meter, rank: int) -> None:
    """Warns of an update that was skipped, and of a loss or a layer's error that jumped. Each rank names its own
    windows.
    """
    loss, errors = update.means["loss"], errors_by_layer(update.means)
    if update.outcome == "bad":
        broken = {layer: error for layer, error in errors.items() if not math.isfinite(error)}
        where = f" (layers {worst_layers(broken, len(broken))})" if broken else ""
        # Where all losses are finite the gradient is not, and any window may have done it.
        if suspects := meter.windows(only_bad=not math.isfinite(loss)):
            text = "step %d skipped: loss %s%s, gradient norm %s; rank %d had windows %s"
            logger.warning(text, step, loss, where, update.grad_norm, rank, suspects)
    elif update.outcome == "stepped" and (found := spikes.found_in(loss, errors)):
        logger.warning("step %d: %s stands out; rank %d had windows %s", step, found, rank, meter.windows())


class UpdateHealth:
    """Measures the share of trained weights that changed since the last report, by part of the model. A sample of each
    parameter's weights is compared bit by bit, on the rank that keeps its moments: no second copy of the model.
    """

    SAMPLE = 2048  # weights of a parameter
    EXPECTED = 0.5  # share that moves at least, between reports, where no update is lost

    def __init__(self, interval: int, student: LlambaForCausalLM, exchange: Exchange, ranks: Ranks) -> None:
        """interval: optimizer steps between reports, 0 for none."""
        self.interval, self.exchange, self.ranks = interval, exchange, ranks
        # Masters gather what is too small to move a 16-bit weight yet, so that nothing is lost.
        self.keeps_masters = student.dtype != torch.float32 and exchange.master_weights
        self.parts = list(parameters_by_part(student))
        part_of = {p: i for i, members in enumerate(parameters_by_part(student).values()) for p in members}
        self.owned = [
            (owned.parameter, part_of[owned.parameter], owned.start + _places(owned, self.SAMPLE))
            for owned, _ in exchange.owned()
        ]
        self.before: list[Tensor] = []
        if self.interval:
            self._remember()

    def add_to(self, row: dict[str, Any]) -> None:
        """Adds the report to the row of an optimizer step if one is due."""
        if self.interval > 0 and row["step"] % self.interval == 0:
            row["update_health"] = self.report()

    def report(self) -> dict[str, float]:
        """Returns for each part the share of sampled weights that moved, the same on all ranks. Only weights that ever
        had a gradient count: rows of the embedding for tokens that were not seen have none.
        """
        counts = torch.zeros(len(self.parts), 2, dtype=torch.float64)
        sampled = zip(self.exchange.owned(), self.owned, self.before, strict=True)
        for (owned, kept), (parameter, part, places), before in sampled:
            if kept:
                trained = kept["exp_avg_sq"][places - owned.start] > 0
                moved = (parameter.detach().view(-1)[places] != before) & trained
                counts[part] += torch.tensor([moved.sum().item(), trained.sum().item()], dtype=torch.float64)
        counts = self.ranks.total(counts)
        self._remember()
        shares = {
            name: round(moved / trained, 4)
            for name, (moved, trained) in zip(self.parts, counts.tolist(), strict=True)
            if trained
        }
        self._warn(shares)
        return shares

    def _remember(self) -> None:
        self.before = [parameter.detach().view(-1)[places].clone() for parameter, _, places in self.owned]

    def _warn(self, shares: dict[str, float]) -> None:
        if self.keeps_masters or not self.ranks.is_main:
            return
        stuck = [f"{100 * share:.1f}% of the {part}" for part, share in shares.items() if share < self.EXPECTED]
        if stuck:
            logger.warning(
                "of the trained weights only %s changed in the last %d steps: updates are too small for the weights' "
                "dtype and are lost; train with --master_weights, or raise --max_lr",
                ", ".join(stuck),
                self.interval,
            )


def _places(owned: Owned, n: int) -> Tensor:
    """Returns the indices of at most n weights, spread over all of those that are owned."""
    generator = torch.Generator().manual_seed(owned.size)
    return torch.randint(owned.size, (min(n, owned.size),), generator=generator).to(owned.parameter.device)
