"""Hybrids of a student and its teacher, scored forward only: KL to the teacher on windows of text, and probes. A hybrid
is named by its recurrent layers; it is what `--layers` with all others makes: the student with these of its own.

Shapes: n windows of S + 1 tokens, D width, V vocabulary.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distillation.fused_loss import choose_chunk_tokens
from distillation.losses import LossInputs, shared_vocab
from evaluation.held_out import held_out_sums
from llamba import LlambaForCausalLM
from selection.hidden_states import HiddenStates, TeacherLayers
from selection.probes import Probe, Score

Recurrent = frozenset[int]  # the layers of a hybrid that are the student's own


class Figures(NamedTuple):
    """Holds the figures of a hybrid by text: of each window its KL(teacher || hybrid), a mean over tokens in nats, and
    the scores of the probes.
    """

    kl: list[float]
    probes: dict[str, Score]


class Swaps:
    """Scores hybrids on some windows and probes. Holds both models, and one hybrid's hidden states.

    teacher_figures: those of the teacher, whose KL is 0.
    """

    def __init__(self, teacher: Any, student: LlambaForCausalLM, windows: Tensor, probes: Sequence[Probe]) -> None:
        """windows: (n, S + 1) int64. Both models are in eval mode, on one device and in one dtype."""
        self.student, self.windows, self.probes = student, windows, probes
        self.teacher_head = teacher.get_output_embeddings()
        self.blocks, self.layers = student.backbone.layers, TeacherLayers(teacher)
        self.n_layers = len(self.blocks)
        parts = [windows[:, :-1], *(probe.ids for probe in probes)]
        whole = (False,) * self.n_layers
        own = HiddenStates(teacher.get_input_embeddings(), parts, whole, self._apply)
        with torch.no_grad():
            hidden, *of_probes = (teacher.base_model.norm(x) for x in own.last(whole))
        self.teacher_hidden = hidden  # (n, S, D)
        self.teacher_figures = Figures([0.0] * len(windows), self._scores(of_probes, self.teacher_head))
        del own
        self.states = HiddenStates(student.backbone.embedding, parts, whole, self._apply)

    def measure(self, sets: Sequence[Recurrent]) -> list[Figures]:
        """Returns the figures of some hybrids. They are fastest if the sets differ from each other in few layers."""
        self.prepare(sets)
        return [self.figures(recurrent) for recurrent in sets]

    def prepare(self, sets: Sequence[Recurrent]) -> None:
        """Stores the states that most of these sets, which are measured next, begin with."""
        if len(sets) > 1:
            self.states.move_to(self._kinds(common_base(sets)))

    @torch.no_grad()
    def figures(self, recurrent: Collection[int]) -> Figures:
        """Returns the figures of the hybrid with these layers recurrent."""
        norm, head = self.student.backbone.final_layernorm, self.student.lm_head
        hidden, *of_probes = (norm(x) for x in self.states.last(self._kinds(recurrent)))
        kl = [self._kl(hidden[i], i) for i in range(len(self.windows))]
        return Figures(kl, self._scores(of_probes, head))

    def _kl(self, hidden: Tensor, window: int) -> float:
        """Returns the KL of one window. hidden: (S, D)."""
        head, teacher_head = self.student.lm_head, self.teacher_head.weight
        vocab = shared_vocab(len(head.weight), len(teacher_head))
        labels = self.windows[window, 1:].to(hidden.device)  # (S,)
        reference = (self.teacher_hidden[window], teacher_head[:vocab])
        inputs = LossInputs(hidden, head.weight, head.bias, *reference, labels, torch.ones_like(labels) > 0, vocab)
        chunk = choose_chunk_tokens(vocab, hidden.dtype, hidden.device)
        return held_out_sums(inputs, 1.0, chunk).means()["kl"]

    def _scores(self, hidden: Sequence[Tensor], head: nn.Linear) -> dict[str, Score]:
        return {probe.name: probe.score(x, head) for probe, x in zip(self.probes, hidden, strict=True)}

    def _kinds(self, recurrent: Collection[int]) -> list[bool]:
        return [index in recurrent for index in range(self.n_layers)]

    def _apply(self, index: int, is_recurrent: bool, x: Tensor) -> Tensor:
        return self.blocks[index](x) if is_recurrent else self.layers(index, x)


def common_base(sets: Sequence[Recurrent]) -> Recurrent:
    """Returns the layers that are in more than half of the sets: the set that all neighbours of one differ from in
    one layer, if there are three of them or more.
    """
    counted = [layer for recurrent in sets for layer in recurrent]
    return frozenset(layer for layer in set(counted) if 2 * counted.count(layer) > len(sets))


def share_weights(module: nn.Module, twin: nn.Module) -> int:
    """Replaces each parameter of a module by that of its twin which has the same name and the same bits: what was
    copied from the teacher is then held once. Returns the bytes that this frees.
    """
    freed = 0
    twins = dict(twin.named_parameters())
    for name, own in list(module.named_parameters()):
        other = twins.get(name)
        if other is not None and other.shape == own.shape and torch.equal(own, other) and own is not other:
            place, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(place), leaf, other)
            freed += own.nbytes
    return freed


def share_models(student: LlambaForCausalLM, teacher: Any) -> int:
    """Has a frozen student hold what equals its teacher's as the teacher's own. Returns the bytes that this frees."""
    backbone, base = student.backbone, teacher.base_model
    pairs: list[tuple[Any, Any]] = [(backbone.embedding, base.embed_tokens), (backbone.final_layernorm, base.norm)]
    pairs += [*zip(backbone.layers, base.layers, strict=False), (student.lm_head, teacher.get_output_embeddings())]
    return sum(share_weights(*pair) for pair in pairs)
