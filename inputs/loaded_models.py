"""Checks of a model that transformers has loaded: whether its files and its config belong together, and whether its
weights are numbers.
"""

import math
import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from inputs.model_files import check_stored_dtypes, folder_of


def check_all_used(flag: str, name: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raises ValueError if weights that the model needs were missing or misshapen, which transformers fills at random,
    or if stored ones belong to its layers and it has no place for them. info: transformers' `loading_info`.
    """
    misshapen = (f"{key} ({_shape(stored)}, expected {_shape(own)})" for key, stored, own in info["mismatched_keys"])
    if lost := sorted([*info["missing_keys"], *misshapen]):
        raise ValueError(
            f"{flag} {name}: weights that its config.json asks for are missing or misshapen: {_first(lost)}; copy the "
            "model again"
        )
    if more := _without_a_place(info["unexpected_keys"], model):
        raise ValueError(
            f"{flag} {name}: its config.json has no place for weights that its files have: {_first(more)}; copy the "
            "model again"
        )


def check_weights(flag: str, name: str, model: PreTrainedModel) -> None:
    """Raises ValueError that names the first weight that is not finite, or is quantised in its file: the files of a
    name on the hub may have come only with the loading.
    """
    folder = folder_of(name)
    if folder is not None and not os.path.isdir(name):
        check_stored_dtypes(flag, name, folder, [weight for weight, _ in model.named_parameters()])
    for weight, parameter in model.named_parameters():
        low, high = (value.item() for value in parameter.detach().aminmax())  # both NaN if any value is
        if not math.isfinite(low) or not math.isfinite(high):
            value = high if math.isinf(high) else low
            raise ValueError(not_finite(flag, name, weight, value, parameter.dtype))


def not_finite(flag: str, name: str, weight: str, value: float, dtype: torch.dtype) -> str:
    """Returns the error on a weight that holds `value`, NaN or an infinity, in `dtype`."""
    remedy = "copy the model again, or take another"
    if math.isinf(value) and dtype == torch.float16:
        remedy = "if its weights are too large for float16, use --dtype bfloat16, else copy the model again"
    return f"{flag} {name}: {weight} holds {value} in {str(dtype).removeprefix('torch.')}, expected numbers; {remedy}"


def _first(names: list[str]) -> str:
    """Returns the first of many names, as text."""
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


def _shape(shape: torch.Size) -> str:
    return "x".join(map(str, shape))


def _without_a_place(unexpected: Iterable[str], model: PreTrainedModel) -> list[str]:
    """Returns those of the unexpected stored weights that belong to the model's own modules, if only to layers that it
    does not have. Others, such as the head of a model loaded without it, may be left aside.
    """

    def module_of(weight: str) -> str:
        return "." + re.sub(r"\d+", "*", weight.rpartition(".")[0])

    own = {module_of(name) for name, _ in model.named_parameters()}
    return sorted(key for key in unexpected if any(module_of(key).endswith(module) for module in own))
