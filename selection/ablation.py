"""What a head, or a whole layer's attention, of the teacher does for a probe: how much worse the teacher is with its
output zeroed. Nothing of a student is needed.
"""

import contextlib
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from selection.hidden_states import HiddenStates, TeacherLayers
from selection.probes import Probe, Score


class Ablations:
    """Scores a teacher on probes while some of its heads give zeros.

    teacher_scores: those of the whole teacher, by the name of the probe.
    """

    def __init__(self, teacher: Any, probes: Sequence[Probe]) -> None:
        self.teacher, self.probes = teacher, probes
        self.layers = TeacherLayers(teacher)
        self.n_layers = teacher.config.num_hidden_layers
        self.n_heads = teacher.config.num_attention_heads
        embedding = teacher.get_input_embeddings()
        self.whole = (frozenset[int](),) * self.n_layers
        self.states = HiddenStates(embedding, [probe.ids for probe in probes], self.whole, self._apply)
        self.teacher_scores = self._scores(self.whole)

    def without(self, layer: int, heads: Collection[int] | None = None) -> dict[str, Score]:
        """Returns the scores without some heads of a layer, by the name of the probe. heads: None for all of them."""
        ablated = frozenset(range(self.n_heads) if heads is None else heads)
        return self._scores((*self.whole[:layer], ablated, *self.whole[layer + 1 :]))

    def _scores(self, ablated: Sequence[frozenset[int]]) -> dict[str, Score]:
        norm, head = self.teacher.base_model.norm, self.teacher.get_output_embeddings()
        states = self.states.last(ablated)
        return {probe.name: probe.score(norm(x), head) for probe, x in zip(self.probes, states, strict=True)}

    def _apply(self, index: int, ablated: frozenset[int], x: Tensor) -> Tensor:
        with zeroed(self.layers.layers[index].self_attn.o_proj, ablated, self.n_heads):
            return self.layers(index, x)


@contextlib.contextmanager
def zeroed(o_proj: nn.Linear, heads: Collection[int], n_heads: int) -> Iterator[None]:
    """Within the block some heads give zeros to the projection of an attention's output."""
    if not heads:
        yield
        return

    def zero(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        split = inputs[0].unflatten(-1, (n_heads, -1)).clone()  # (n, S, H, P)
        split[..., sorted(heads), :] = 0
        return (split.flatten(-2), *inputs[1:])

    hook = o_proj.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        hook.remove()


def growth(score: Score, of_teacher: Score) -> list[float]:
    """Returns by how much the loss of each text is larger than the teacher's own, in nats."""
    return [loss - own for loss, own in zip(score.loss, of_teacher.loss, strict=True)]


def mean_growth(scores: dict[str, Score], of_teacher: dict[str, Score]) -> float:
    """Returns the growth of the loss, a mean over texts, then over probes. 0 without probes."""
    growths = [growth(scores[name], own) for name, own in of_teacher.items()]
    return math.fsum(math.fsum(values) / len(values) for values in growths) / max(len(growths), 1)


@torch.no_grad()
def ablation_scores(teacher: Any, probes: Sequence[Probe]) -> tuple[list[float], list[list[float]]]:
    """Returns the mean growth of the probes' loss without each layer's attention, and without each of its heads: (L,)
    and (L, H), in nats per answer.
    """
    ablations = Ablations(teacher, probes)
    own = ablations.teacher_scores
    layers = [mean_growth(ablations.without(layer), own) for layer in range(ablations.n_layers)]
    heads = [
        [mean_growth(ablations.without(layer, [head]), own) for head in range(ablations.n_heads)]
        for layer in range(ablations.n_layers)
    ]
    return layers, heads
