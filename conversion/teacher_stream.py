"""The teacher's own hidden states, layer after layer, beside a student that was made from it: every tensor that both
have is held once.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from conversion.teacher_weights import TeacherWeights
from llamba import LlambaForCausalLM
from llamba.families import DecoderLayer
from llamba.llama import FrozenMLP, use_kernels


class Traced:
    """Holds what a layer of the teacher read and computed, (B, S, D) where nothing else is said."""

    def __init__(self, layer: DecoderLayer, hidden: Tensor, attention: Tensor, angles: tuple[Tensor, Tensor]) -> None:
        self.layer = layer
        self.angles = angles  # cosines and sines of the rotary positions, (1, S, head_dim) each
        self.hidden = hidden  # its input, before the norm
        self.attention = attention  # what its attention adds to that

    @functools.cached_property
    def output(self) -> Tensor:
        """Returns the output of the whole layer, whose MLP runs when this is first asked for."""
        with torch.no_grad():
            between = self.hidden + self.attention
            return between + self.layer.mlp(self.layer.post_attention_layernorm(between))


class TeacherStream:
    """Runs a teacher for a student of its shape. Called with input_ids (B, S), it returns the last hidden states
    (B, S, D) after the last norm, as `distillation.teacher.Teacher` does for the signal "hidden".

    Reads the teacher one layer at a time. A tensor that the student has bit for bit is the student's own; what it has
    not, such as the attention of its recurrent layers, is held here. What is the student's must be frozen.
    """

    def __init__(self, weights: TeacherWeights, student: LlambaForCausalLM, vocab: int) -> None:
        """vocab: entries that both vocabularies have."""
        backbone = student.backbone
        dtype, self.device = backbone.embedding.weight.dtype, backbone.embedding.weight.device
        self.bytes_held, self.bytes_shared = 0, 0
        self.embedding = self._shared(weights.embedding(dtype, self.device), backbone.embedding.weight)  # (V, D)
        self.layers: list[DecoderLayer] = []
        for index, twin in enumerate(backbone.layers):
            self.layers.append(weights.layer(index, dtype, self.device))
            self._share(self.layers[-1], twin)
        self.norm = weights.norm(dtype, self.device)
        self._share(self.norm, backbone.final_layernorm)
        head = self.embedding  # (V, D)
        if not weights.config.tie_word_embeddings:
            head = self._shared(weights.head(dtype, self.device), student.lm_head.weight)
        self.head = head.detach()[:vocab]  # (vocab, D)
        self.rotary = weights.rotary(self.device)
        for module in (*self.layers, self.norm):
            use_kernels(module, FrozenMLP)

    def _share(self, module: nn.Module, twin: nn.Module) -> None:
        """Replaces the parameters of a module by those of the student's that have the same name and values."""
        twins = dict(twin.named_parameters())
        for name, parameter in list(module.named_parameters()):
            place, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(place), leaf, self._shared(parameter, twins.get(name)))

    @staticmethod
    def are_equal(given: Tensor, twin: Tensor) -> bool:
        """Returns whether two tensors of one shape are the same bit for bit."""
        return torch.equal(given, twin)

    def _shared(self, given: Tensor, twin: Any) -> nn.Parameter:
        """Returns the student's parameter if it equals the given tensor, else a frozen parameter of that."""
        if twin is not None and given.shape == twin.shape and self.are_equal(given, twin):
            assert not twin.requires_grad
            self.bytes_shared += twin.nbytes
            return twin
        self.bytes_held += given.nbytes
        return nn.Parameter(given.detach(), requires_grad=False)

    def walk(self, input_ids: Tensor) -> Iterator[Traced]:
        """Yields what each layer does to input_ids (B, S); of a layer only its output is kept for the next. Who stops
        after a layer has not run its MLP, unless its output was read.
        """
        with torch.no_grad():
            hidden = nn.functional.embedding(input_ids.to(self.device), self.embedding)  # (B, S, D)
            rotary = self.rotary(hidden, torch.arange(hidden.shape[1], device=self.device)[None])
        for layer in self.layers:
            with torch.no_grad():
                attention, _ = layer.self_attn(layer.input_layernorm(hidden), rotary, None)  # causal without a mask
            traced = Traced(layer, hidden, attention, rotary)
            yield traced
            hidden = traced.output

    @torch.no_grad()
    def __call__(self, input_ids: Tensor) -> Tensor:
        for traced in self.walk(input_ids):
            last = traced.output
        return self.norm(last)

    def hidden_states(self, input_ids: Tensor) -> list[Tensor]:
        """Returns the input of the first layer and the output of each: n_layer + 1 tensors (B, S, D), none normed."""
        states: list[Tensor] = []
        for traced in self.walk(input_ids):
            states += [traced.output] if states else [traced.hidden, traced.output]
        return states
