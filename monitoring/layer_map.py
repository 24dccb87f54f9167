"""Maps of how far each layer of the student is from the teacher's, every `--layer_map_interval` optimizer steps:
`stream` shows how the hidden states drift apart on their way through both models, `own` the error of each layer by
itself.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conversion.measure import relative_to
from distillation.teacher import Lane, NoTeacher
from llamba import LlambaForCausalLM
from monitoring.layer_errors import worst_layers
from monitoring.undisturbed import undisturbed
from text.batch import Batch

logger = logging.getLogger("train")

MOST_TOKENS = 512  # of one window: for an 8B model 33 hidden states take 140 MB on each device


class LayerMap:
    """Makes the maps on the first rank, with the teacher that it runs."""

    def __init__(self, interval: int, student: LlambaForCausalLM, lane: Lane, compiled: bool = False) -> None:
        """interval: optimizer steps between maps, 0 for none; compiled: the student's blocks are."""
        self.interval, self.student, self.lane, self.compiled = interval, student, lane, compiled

    def add_to(self, row: dict[str, Any], batch: Batch) -> None:
        """Adds a map to the row of an optimizer step if one is due, of the beginning of `batch`'s first window."""
        if not self.interval or row["step"] % self.interval:
            return
        try:
            row["layer_map"] = self._map(batch.input_ids[:1, :MOST_TOKENS])
            logger.info(format_map(row))
        except Exception as error:  # of any kind, lack of memory too: the run is more important
            self.interval = 0
            logger.warning("layer map: %s: %s; no more are made", type(error).__name__, error)
        self.lane.waits.take()  # no waiting of training

    def _map(self, input_ids: Tensor) -> dict[str, list[float]]:
        assert not isinstance(self.lane, NoTeacher)
        with undisturbed(self.student, self.compiled):
            return layer_map(self.student, input_ids, self.lane.hidden_states(input_ids))


def layer_map(student: LlambaForCausalLM, input_ids: Tensor, states: list[Tensor]) -> dict[str, list[float]]:
    """Returns the errors of each layer, as means over tokens.

    input_ids (B, S); states: of the teacher, the input of its first layer and the output of each, n_layer + 1 tensors
    (B, S, D) on the student's device.

    stream: ||h_s - h_t|| / ||h_t|| after each layer, h_s and h_t being the hidden states of student and teacher.
    own: of each layer alone, given the teacher's h_t before it: ||f_s(h_t) - f_t(h_t)|| / ||f_t(h_t) - h_t||. 0 is a
    layer that equals the teacher's, 1 one with the error of a layer that does nothing. Where the teacher's layer does
    nothing, a millionth of ||h_t|| is divided by: 0 is right there too, and any error is large (`relative_to`).
    """
    inputs, outputs = states[:-1], states[1:]
    updates = [after - before for before, after in zip(inputs, outputs, strict=True)]
    stream = _errors(student, input_ids, outputs, outputs)
    own = _errors(student, input_ids, outputs, updates, inputs)
    return {"stream": stream, "own": own}


@torch.no_grad()
def _errors(
    student: LlambaForCausalLM,
    input_ids: Tensor,
    expected: list[Tensor],
    scales: list[Tensor],
    inputs: list[Tensor] | None = None,
) -> list[float]:
    """Returns each layer's error, relative to `scales`. inputs: replace the layers' own, if given."""
    errors: list[Tensor] = []
    least = scales if inputs is None else inputs

    def compare(i: int) -> Callable:
        def hook(_module, _args, output: Tensor) -> None:
            errors.append(relative_to(scales[i], output.float() - expected[i].float(), least[i]))

        return hook

    def replace(state: Tensor) -> Callable:
        return lambda _module, args: (state, *args[1:])

    layers = student.backbone.layers
    handles = [layer.register_forward_hook(compare(i)) for i, layer in enumerate(layers)]
    if inputs is not None:
        handles += [layer.register_forward_pre_hook(replace(inputs[i])) for i, layer in enumerate(layers)]
    try:
        student.backbone(input_ids.to(expected[0].device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [round(error, 6) for error in torch.stack(errors).tolist()]


def format_map(row: dict[str, Any]) -> str:
    """Returns the log line of a map: the layers with the largest errors of their own, and the error at the end."""
    own, stream = row["layer_map"]["own"], row["layer_map"]["stream"]
    named = worst_layers(dict(enumerate(own)))
    return f"layer map (opt {row['step']}) | largest errors: layers {named} | after the last layer {stream[-1]:.3f}"
