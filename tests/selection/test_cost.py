"""The bytes of a hybrid's cache against those of a real one, and how many layers fit."""

import copy

import pytest
import torch

from model_utils import apply_replacements
from selection.cost import cache_bytes, evaluations, most_layers
from selection.greedy import greedy
from tests.tiny import tiny_student, tiny_teacher, tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layers", [[1], [0, 1, 3]])
@torch.no_grad()
def test_the_bytes_are_those_of_a_cache(dtype, layers):
    teacher, student = tiny_teacher(), tiny_student()
    hybrid = copy.deepcopy(student).to(getattr(torch, dtype))
    apply_replacements(hybrid, teacher, layers)
    cache = hybrid(tokens(1, 30), use_cache=True).past_key_values
    states = [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    counted = cache_bytes((teacher.config, student.config), range(len(layers)), {}, 30, dtype)
    assert counted == sum(state.nbytes for state in states)


def test_as_many_layers_as_fit():
    teacher, student = tiny_teacher().config, tiny_student().config
    sizes = [cache_bytes((teacher, student), range(k), {}, 1000, "float32") for k in range(5)]
    assert [most_layers(teacher, student, size, 1000, "float32") for size in sizes[1:4]] == [1, 2, 3]
    assert most_layers(teacher, student, sizes[2] - 1, 1000, "float32") == 1
    assert most_layers(teacher, student, 10**12, 1000, "float32") == 3  # all would be no hybrid
    with pytest.raises(ValueError, match=f"--cache_bytes 9: .* takes {sizes[1]} at --context_length 1000"):
        most_layers(teacher, student, 9, 1000, "float32")


@pytest.mark.parametrize("n_kept", [1, 3, 5])
def test_the_plan_counts_what_is_measured(n_kept):
    measured = []

    def measure(sets):
        measured.extend(sets)
        return [2.0 ** (len(measured) - len(sets) + i) for i in range(len(sets))]

    for direction in ("keep", "recur"):
        greedy(6, measure, float, n_kept, direction)
    assert evaluations(6, n_kept) == len(measured) + 2
