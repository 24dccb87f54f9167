"""The texts that a choice is made on, and, kept apart from them, those of its last figures: a set that was chosen on
some texts looks better on these than it is.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selection.probes import ABOVE_CHANCE, Probe, Score, copying_probe, retrieval_probe
from selection.statistics import estimate

RETRIEVAL_LENGTH, RETRIEVAL_PAIRS = 256, 4


@dataclass
class Material:
    """Holds windows of text (n, S + 1), probes, and why others are missing, by name."""

    windows: Tensor
    probes: list[Probe]
    left_out: dict[str, str] = field(default_factory=dict)

    def part(self, is_aside: bool) -> "Material":
        """Returns the texts to choose on, two thirds, or those that are kept aside."""
        windows = self.windows[_part(len(self.windows), is_aside)]
        probes = [probe.part(range(probe.n_texts)[_part(probe.n_texts, is_aside)]) for probe in self.probes]
        return Material(windows, probes, self.left_out)

    @property
    def shape(self) -> tuple[int, dict[str, int]]:
        """Returns how many windows there are, and how many texts of each probe."""
        return len(self.windows), {probe.name: probe.n_texts for probe in self.probes}


def _part(n: int, is_aside: bool) -> slice:
    n_choosing = n - n // 3
    return slice(n_choosing, None) if is_aside else slice(n_choosing)


def build_probes(
    tokenizer: PreTrainedTokenizerBase, n_texts: int, seed: int, context: int | None
) -> tuple[list[Probe], dict[str, str]]:
    """Returns the probes that the tokenizer and the context of the teacher allow, and why others are left out."""
    probes, left_out = [], {}
    length = min(RETRIEVAL_LENGTH, context or RETRIEVAL_LENGTH)
    found = {
        "copying": (copying_probe(tokenizer, n_texts, seed), "the vocabulary has too few words of one token"),
        "retrieval": (
            retrieval_probe(tokenizer, n_texts, length, RETRIEVAL_PAIRS, seed),
            f"its {RETRIEVAL_PAIRS} pairs take more than {length} tokens",
        ),
    }
    for name, (probe, reason) in found.items():
        if probe is None:
            left_out[name] = reason
        elif context is not None and probe.ids.shape[1] > context:
            left_out[name] = f"its texts have {probe.ids.shape[1]} tokens, and the teacher reads {context}"
        else:
            probes.append(probe)
    return probes, left_out


def why_unable(probe: Probe, score: Score) -> str | None:
    """Returns why a teacher of this score cannot do a probe, None if it can."""
    acc, least = estimate(score.acc), probe.chance + ABOVE_CHANCE
    if acc.mean >= least:
        return None
    return f"the teacher is right in {acc} of its answers, and {least:.2f} are needed (chance {probe.chance:.2f})"


def usable(material: Material, scores: dict[str, Score]) -> Material:
    """Returns the material without the probes that the teacher cannot do. scores: of the teacher, on some of it."""
    reasons = {probe.name: why_unable(probe, scores[probe.name]) for probe in material.probes}
    left_out = material.left_out | {name: reason for name, reason in reasons.items() if reason is not None}
    return Material(material.windows, [p for p in material.probes if reasons[p.name] is None], left_out)


def no_probe(left_out: dict[str, str]) -> str:
    """Returns the error on heads that no probe can compare. left_out: why, by the name of the probe."""
    reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
    return f"no probe could be used to compare heads ({reasons}); name heads, or keep layers"


def ids_of(material: Material) -> list[Tensor]:
    """Returns all token ids, and which of them are answers."""
    return [material.windows, *(torch.stack([probe.ids, probe.answer]) for probe in material.probes)]
