"""What a choice takes, counted before anything runs: tokens that go forward, the part of the planned run that they are,
memory, and the bytes of a hybrid's cache.
"""

import copy
from dataclasses import dataclass

from transformers import PretrainedConfig

import llamba
from inputs.model_files import parameter_sizes
from llamba import LlambaConfig, attention_cfg_from
from model_utils import DTYPES

GB = 1e9
PLANNED_RANKS = 4  # of configs/production.yaml


@dataclass(frozen=True)
class Cost:
    """Says how many tokens go forward through a whole model, and what is held."""

    tokens: int
    planned: int  # tokens that the run trains on
    model_bytes: int  # both models, before what they share
    state_bytes: int  # hidden states, on the CPU

    def __str__(self) -> str:
        percent = 100 * self.tokens / self.planned
        share = f"{percent:,.0f}%" if percent >= 10 else f"{percent:.2g}%"
        return f"{self.tokens:,} tokens forward, {share} of the {self.planned:,} that the planned run trains on"


def evaluations(n_layers: int, n_kept: int) -> int:
    """Returns how many sets are measured on the texts for choosing: single swaps, and both directions' rounds."""
    keep = 1 + sum(n_layers - i for i in range(n_kept))
    recur = 1 + sum(n_layers - i for i in range(n_layers - n_kept))
    return keep + recur + 2  # the first round of "recur" are the single swaps; ranking and evenly come to it


def choice_cost(
    configs: tuple[PretrainedConfig, LlambaConfig],
    n_kept: int,
    n_tokens: tuple[int, int],
    ablates: bool,
    planned: int,
    dtype: str,
) -> Cost:
    """Returns the cost of a choice. n_kept: 0 where only heads are compared, by the probes alone. n_tokens: of all
    windows, and of all probes; two thirds of both choose.
    """
    teacher, student = configs
    n_layers, tokens = student.n_layer, 0
    choosing, aside = 2 * (sum(n_tokens) if n_kept else n_tokens[1]) // 3, sum(n_tokens) // 3
    if n_kept:
        rounds = n_kept + (n_layers - n_kept) + 2
        tokens += choosing * (evaluations(n_layers, n_kept) + rounds) // 2 + 5 * aside
    if ablates:
        n_ablations = n_layers * (1 + teacher.num_attention_heads)
        n_passes = n_ablations * (n_layers + 1) // (2 * n_layers) + 1  # one of the whole, and of the rest of each
        tokens += 2 * n_tokens[1] // 3 * n_passes
    size = DTYPES[dtype].itemsize
    n_parameters = sum(sum(parameter_sizes(config).values()) for config in configs)
    states = (n_layers + 1) * choosing * student.d_model * size
    return Cost(tokens, planned, n_parameters * size, states)


def cache_bytes(teacher: PretrainedConfig, student: LlambaConfig, n_kept: int, length: int, dtype: str) -> int:
    """Returns the bytes of the cache of one sequence of `length` tokens, `n_kept` of whose layers are the teacher's."""
    hybrid = copy.deepcopy(student)
    hybrid.attention_layers, hybrid.attention_cfg = list(range(n_kept)), attention_cfg_from(teacher)
    return llamba.cache_bytes(hybrid, 1, length, DTYPES[dtype])


def most_layers(teacher: PretrainedConfig, student: LlambaConfig, n_bytes: int, length: int, dtype: str) -> int:
    """Returns how many layers a cache of `n_bytes` has room for. Raises ValueError if not for one."""
    fits = [k for k in range(1, student.n_layer) if cache_bytes(teacher, student, k, length, dtype) <= n_bytes]
    if not fits:
        least = cache_bytes(teacher, student, 1, length, dtype)
        raise ValueError(
            f"--cache_bytes {n_bytes}: a single layer of the teacher's, with the states of the others, takes {least} "
            f"at --context_length {length}; give at least that"
        )
    return max(fits)
