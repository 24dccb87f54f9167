"""What a choice takes, counted before anything runs: tokens that go forward, the part of the planned run that they are,
memory, and the bytes of a hybrid's cache.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig

import llamba
from inputs.model_files import parameter_sizes
from llamba import LlambaConfig, attention_cfg_from
from llamba.configuration import whole_and_parts
from model_utils import DTYPES
from selection.reach import heads_per_group, rounds

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
    asked: tuple[int, int],
    n_tokens: tuple[int, int],
    ablates: bool,
    planned: int,
    dtype: str,
) -> Cost:
    """Returns the cost of a choice. asked: how many layers and heads are searched for, 0 for none. n_tokens: of
    all windows, and of all probes; two thirds of both choose.
    """
    teacher, student = configs
    n_kept, n_heads = asked
    n_layers, tokens, of_probes = student.n_layer, 0, 2 * n_tokens[1] // 3
    choosing, aside = 2 * sum(n_tokens) // 3 if n_kept else of_probes, sum(n_tokens) // 3
    if n_kept:
        n_rounds = n_kept + (n_layers - n_kept) + 2
        tokens += choosing * (evaluations(n_layers, n_kept) + n_rounds) // 2 + 5 * aside
    if ablates:
        n_ablations = n_layers * (1 + teacher.num_attention_heads)
        n_passes = n_ablations * (n_layers + 1) // (2 * n_layers) + 1  # one of the whole, and of the rest of each
        tokens += of_probes * n_passes
    if n_heads:
        n_groups = (n_layers - n_kept) * teacher.num_key_value_heads
        sizes = rounds(n_groups, n_heads // heads_per_group(teacher))
        tokens += of_probes * (1 + len(sizes) + sum(sizes) * (n_layers + 1) // (2 * n_layers))
        tokens += n_tokens[1] // 3 * 2 * (len(sizes) + 2)
    size = DTYPES[dtype].itemsize
    n_parameters = sum(sum(parameter_sizes(config).values()) for config in configs)
    states = (n_layers + 1) * choosing * student.d_model * size
    return Cost(tokens, planned, n_parameters * size, states)


def cache_bytes(
    configs: tuple[PretrainedConfig, LlambaConfig],
    layers: Iterable[int],
    heads: Mapping[int, Iterable[int]],
    length: int,
    dtype: str,
) -> int:
    """Returns the bytes of the cache of one sequence of `length` tokens, of a hybrid that keeps some of the teacher's
    layers, and heads of others.
    """
    teacher, student = configs
    hybrid = copy.deepcopy(student)
    hybrid.attention_cfg = attention_cfg_from(teacher)
    hybrid.attention_layers, hybrid.attention_heads = whole_and_parts(layers, heads, teacher.num_attention_heads)
    return llamba.cache_bytes(hybrid, 1, length, DTYPES[dtype])


def most_layers(teacher: PretrainedConfig, student: LlambaConfig, n_bytes: int, length: int, dtype: str) -> int:
    """Returns how many layers a cache of `n_bytes` has room for. Raises ValueError if not for one."""
    sizes = [cache_bytes((teacher, student), range(k), {}, length, dtype) for k in range(1, student.n_layer)]
    fits = [k for k, size in enumerate(sizes, 1) if size <= n_bytes]
    if not fits:
        raise ValueError(
            f"--cache_bytes {n_bytes}: a single layer of the teacher's, with the states of the others, takes "
            f"{sizes[0]} at --context_length {length}; give at least that"
        )
    return max(fits)
