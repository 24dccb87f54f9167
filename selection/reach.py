"""Which of the teacher's key/value heads have to look far back. The teacher is scored on probes while all other heads
see only the first tokens and the last ones, which is what a recurrent head can stand for: a decaying memory of what
came shortly before. Heads that pass on the token before are no loss then, though the teacher fails without them.

A group is a key/value head with the query heads that read it: they share a cache, and are kept together. Heads that do
with few tokens are known from DuoAttention (arXiv 2410.10819), which learns which they are.

Shapes: H query heads of a layer, in G groups; a text has S tokens.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from selection.hidden_states import HiddenStates, TeacherLayers
from selection.probes import Probe, Score

FIRST, LAST = 4, 16  # tokens that every head sees: of the beginning, where attention that is not needed goes, and last
LEFT_OUT = 4  # one group in so many is made short-sighted in each round

Group = tuple[int, int]  # a layer, and a key/value head of it
Far = frozenset[Group]  # those that see all tokens


def heads_per_group(teacher: PretrainedConfig) -> int:
    """Returns how many query heads share a key/value head."""
    return teacher.num_attention_heads // teacher.num_key_value_heads


class ShortSighted:
    """Scores a teacher of which only some groups see far."""

    def __init__(self, teacher: Any, probes: Sequence[Probe]) -> None:
        self.teacher, self.probes = teacher, probes
        self.layers = TeacherLayers(teacher)
        self.n_layers, self.n_groups = teacher.config.num_hidden_layers, teacher.config.num_key_value_heads
        self.per_group = heads_per_group(teacher.config)
        parts = [probe.ids for probe in probes]
        every = self._kinds(frozenset(self.groups_of(range(self.n_layers))))
        self.states = HiddenStates(teacher.get_input_embeddings(), parts, every, self._apply)

    def groups_of(self, layers: Iterable[int]) -> list[Group]:
        """Returns all groups of some layers."""
        return [(layer, group) for layer in layers for group in range(self.n_groups)]

    def heads_of(self, groups: Iterable[Group]) -> list[Group]:
        """Returns the query heads of some groups, each with its layer."""
        n = self.per_group
        return [(layer, head) for layer, group in sorted(groups) for head in range(group * n, (group + 1) * n)]

    def prepare(self, far: Far) -> None:
        """Stores the states of the teacher that those measured next differ from in one group each."""
        self.states.move_to(self._kinds(far))

    @torch.no_grad()
    def scores(self, far: Far) -> dict[str, Score]:
        """Returns the scores by the name of the probe."""
        norm, head = self.teacher.base_model.norm, self.teacher.get_output_embeddings()
        states = self.states.last(self._kinds(far))
        return {probe.name: probe.score(norm(x), head) for probe, x in zip(self.probes, states, strict=True)}

    def _kinds(self, far: Far) -> list[frozenset[int]]:
        return [frozenset(group for of, group in far if of == layer) for layer in range(self.n_layers)]

    def _apply(self, index: int, far: frozenset[int], x: Tensor) -> Tensor:
        return self.layers(index, x, None if len(far) == self.n_groups else self._mask(far, x))

    def _mask(self, far: Collection[int], x: Tensor) -> Tensor:
        """Returns what is added to the scores of a layer: (1, H, S, S) in the dtype of x (n, S, D)."""
        place = torch.arange(x.shape[1], device=x.device)
        back = place[:, None] - place  # (S, S): how many tokens a key is before a query
        is_near = (back < LAST) | (place < FIRST)  # (S, S)
        sees_far = torch.tensor([head // self.per_group in far for head in range(self.n_groups * self.per_group)])
        seen = (back >= 0) & (is_near | sees_far.to(x.device)[:, None, None])  # (H, S, S)
        return torch.zeros_like(seen, dtype=x.dtype).masked_fill(~seen, -torch.inf)[None]


def thinned_out(
    groups: Collection[Group], n_kept: int, measure: Callable[[Far, Sequence[Group]], Sequence[float]]
) -> list[Far]:
    """Returns the sets on the way from all groups to `n_kept` of them, the start first.

    Each round measures the set without each of its groups, and leaves out a quarter: those that are missed least. Going
    down from all finds groups that need each other, as copying needs several, of which none by itself brings anything.

    measure: from a set, and groups of it, to the loss of the set without each of these.
    """
    assert 0 <= n_kept <= len(groups)
    path = [frozenset(groups)]
    while (n_left := len(path[-1])) > n_kept:
        ordered = sorted(path[-1])
        losses = dict(zip(ordered, measure(path[-1], ordered), strict=True))
        n_next = max(n_kept, n_left - max(1, n_left // LEFT_OUT))
        missed = sorted(ordered, key=lambda group: (-losses[group], group))
        path.append(frozenset(missed[:n_next]))
    return path


def rounds(n_groups: int, n_kept: int) -> list[int]:
    """Returns how many groups `thinned_out` begins each of its rounds with."""
    path = thinned_out([(0, i) for i in range(n_groups)], n_kept, lambda far, some: [0.0] * len(some))
    return [len(far) for far in path[:-1]]
