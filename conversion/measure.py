"""What was reached: the error of each layer by itself, and the KL of whole students on held-out text. Everything goes
through the models layer by layer, so that no model is ever whole in memory.

Shapes: B windows, S tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from distillation.fused_loss import choose_chunk_tokens
from distillation.losses import LossInputs
from evaluation.held_out import HeldOutSums, held_out_sums
from llamba import LlambaBlock
from llamba.families import DecoderLayer

TOKENS_AT_ONCE = 2048  # in a layer: its MLP's activations take the most memory
SMALLEST = 1e-6  # of a hidden state's norm

Layer = Callable[[Tensor], Tensor]


class HeldOutStreams:
    """Carries the hidden states of held-out windows through teacher and students, a layer at a time.

    states: of each model (B, S, D) float32. `teacher`; `all_recurrent`, the student as it is written; with `layers` of
    the teacher's also `hybrid`; and both without mixers: what a mixer that gives zeros, or does harm, is compared with.
    """

    def __init__(self, teacher: Tensor, student: Tensor, layers: Collection[int]) -> None:
        """teacher, student: what each one's embedding has for the windows."""
        self.layers = frozenset(layers)
        students = ["all_recurrent", "no_mixers"] + ["hybrid", "hybrid_no_mixers"] * bool(layers)
        self.states = {"teacher": teacher, **dict.fromkeys(students, student)}

    @torch.no_grad()
    def advance(
        self, index: int, teacher: DecoderLayer, block: LlambaBlock, angles: tuple[Tensor, Tensor]
    ) -> dict[str, float]:
        """Moves every stream through layer `index`, and returns the layer's own errors, as means over tokens:

        own: ||f_s(h) - f_t(h)|| / ||f_t(h) - h||, of the whole layer given the teacher's h, as in a layer map.
        mixer: ||mixer(u) - attention(u)|| / ||attention(u)||, of the mixer alone, or with the heads beside it.
        """
        before = self.states["teacher"]
        attention = in_parts(lambda x: attend(teacher, x, angles), before)
        mixed = in_parts(lambda x: block.mix(block.input_layernorm(x), position_embeddings=angles), before)
        after = in_parts(lambda x: add_mlp(teacher, x), before + attention)
        own = in_parts(lambda x: add_mlp(block, x), before + mixed)

        is_teachers = index in self.layers
        for name, state in self.states.items():
            if name == "teacher":
                self.states[name] = after
            elif is_teachers and name.startswith("hybrid"):
                self.states[name] = in_parts(lambda x: add_mlp(teacher, x + attend(teacher, x, angles)), state)
            elif name.endswith("no_mixers"):
                self.states[name] = in_parts(lambda x: add_mlp(block, x), state)
            else:
                self.states[name] = in_parts(lambda x: block(x, position_embeddings=angles), state)
        return {
            "own": relative_to(after - before, own - after, before).item(),
            "mixer": relative_to(attention, mixed - attention, before).item(),
        }

    @torch.no_grad()
    def figures(self, norms: tuple[Layer, Layer], heads: tuple[Tensor, Tensor], labels: Tensor) -> dict[str, Any]:
        """Returns of each student its `kl` to the teacher, `ce`, `agreement` and `perplexity`, and the teacher's own.

        norms, heads (V, D): of teacher and student. labels: (B, S).
        """
        teacher = norms[0](self.states["teacher"])  # (B, S, D)
        found = {"teacher": _sums(teacher, heads[0], None, None, labels).means()}
        for name, state in self.states.items():
            if name != "teacher":
                found[name] = _sums(norms[1](state), heads[1], teacher, heads[0], labels).means()
        return found


def attend(layer: DecoderLayer, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Returns what a layer's attention adds to its input x: (B, S, D)."""
    return layer.self_attn(layer.input_layernorm(x), position_embeddings=angles, attention_mask=None)[0]


def add_mlp(layer: DecoderLayer | LlambaBlock, x: Tensor) -> Tensor:
    """Returns x (B, S, D) and what a layer's MLP adds to it."""
    return x + layer.mlp(layer.post_attention_layernorm(x))


def in_parts(function: Layer, x: Tensor) -> Tensor:
    """Returns a function of x (B, S, D), some windows at a time, so that its activations take little memory."""
    return torch.cat([function(part) for part in x.split(max(1, TOKENS_AT_ONCE // x.shape[1]))])


def relative_to(scale: Tensor, error: Tensor, hidden: Tensor) -> Tensor:
    """Returns ||error|| / ||scale||, the mean over tokens of (B, S, D): a float32 scalar. Of a layer that gives zeros,
    `scale` is 0: at least `SMALLEST` of ||hidden||, the layer's input, is divided by. No error is 0, whatever it is
    divided by; an error where all else is zero, as of a token whose embedding is, is infinite.
    """
    error, scale, least = (x.float().norm(dim=-1) for x in (error, scale, hidden))  # (B, S) each
    relative = error / torch.maximum(scale, SMALLEST * least)
    return relative.where(error != 0, 0.0).mean()


def _sums(
    hidden: Tensor, head: Tensor, teacher: Tensor | None, teacher_head: Tensor | None, labels: Tensor
) -> HeldOutSums:
    mask = torch.ones_like(labels, dtype=torch.bool)
    inputs = LossInputs(hidden, head, None, teacher, teacher_head, labels, mask, len(head))
    return held_out_sums(inputs, 1.0, choose_chunk_tokens(len(head), hidden.dtype, hidden.device))
