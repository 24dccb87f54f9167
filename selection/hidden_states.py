"""Hidden states of some texts before each layer of a model that is a base for others. A model that differs from the
base in some layers starts at the first of them: on average that halves what a comparison of models costs.

Shapes: a part is n texts of S tokens; D width.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

TOKENS_AT_ONCE = 2048  # that go through the layers together

Apply = Callable[[int, Any, Tensor], Tensor]


class HiddenStates:
    """Keeps the states on the CPU, in their dtype. A model is named by what each of its layers is, a kind."""

    def __init__(self, embedding: nn.Module, parts: Sequence[Tensor], base: Sequence[Hashable], apply: Apply) -> None:
        """parts: token ids, (n, S) each. apply: from a layer's index, kind and input (n, S, D) to its output."""
        self.apply, self.device = apply, next(embedding.parameters()).device
        with torch.no_grad():
            self.before = [[embedding(ids.to(self.device)).cpu() for ids in parts]]  # of each layer: (n, S, D) a part
        self.base: list[Hashable] = []
        self.tokens_run = 0  # tokens that have gone through a layer
        self.move_to(base)

    @torch.no_grad()
    def move_to(self, base: Sequence[Hashable]) -> None:
        """Makes another model the base; what both have before their first difference stays."""
        start = self._first_difference(base)
        del self.before[start + 1 :]
        for index in range(start, len(base) - 1):  # the last layer's output is not before any
            step = [
                torch.cat([self._run(index, [base[index]], piece).cpu() for piece in _pieces(states)])
                for states in self.before[index]
            ]
            self.before.append(step)
        self.base = list(base)

    @torch.no_grad()
    def last(self, kinds: Sequence[Hashable]) -> list[Tensor]:
        """Returns the output of the last layer of a model, of each part (n, S, D), on the device of the weights."""
        start = min(self._first_difference(kinds), len(kinds) - 1)
        parts = self.before[start]
        return [torch.cat([self._run(start, kinds[start:], piece) for piece in _pieces(states)]) for states in parts]

    def _run(self, start: int, kinds: Sequence[Hashable], states: Tensor) -> Tensor:
        """Returns some states (n, S, D) behind the layers from `start` on."""
        x = states.to(self.device)
        for index, kind in enumerate(kinds, start):
            x = self.apply(index, kind, x)
        self.tokens_run += len(kinds) * x.shape[0] * x.shape[1]
        return x

    def _first_difference(self, kinds: Sequence[Hashable]) -> int:
        pairs = enumerate(zip(self.base, kinds, strict=False))
        return next((index for index, (own, other) in pairs if own != other), len(self.base))


def _pieces(states: Tensor) -> Sequence[Tensor]:
    return states.split(max(1, TOKENS_AT_ONCE // states.shape[1]))


class TeacherLayers:
    """Calls layers of a teacher on hidden states alone: causal, positions from 0."""

    def __init__(self, teacher: Any) -> None:
        """teacher: a causal LM of transformers whose base model has `layers` and `rotary_emb`."""
        self.layers, self.rotary = teacher.base_model.layers, teacher.base_model.rotary_emb
        self.angles: dict[int, tuple[Tensor, Tensor]] = {}  # by the length of a text

    def __call__(self, index: int, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: (1, H, S, S), added to the scores; None for what is causal."""
        length = x.shape[1]
        if length not in self.angles:
            self.angles[length] = self.rotary(x, torch.arange(length, device=x.device)[None])
        return self.layers[index](x, position_embeddings=self.angles[length], attention_mask=mask)
