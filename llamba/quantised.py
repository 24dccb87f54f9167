"""Recognises quantised models, by their config and by the dtypes of their stored weights. None is supported: loaded
without the arithmetic that belongs to them, their integers would be taken for weights.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

SUPPORTED = "supported are float32, bfloat16 and float16 weights; give the model that it was made from"
FLOATS = ("float64", "float32", "bfloat16", "float16")
# By safetensors' names of dtypes.
TORCH_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "BOOL": "bool"}
TORCH_NAMES |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}
TORCH_NAMES |= {f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)}


def dtype_name(stored: str) -> str:
    """Returns torch's name of a dtype that safetensors (F16) or torch (torch.float16) names."""
    return TORCH_NAMES.get(stored, stored.removeprefix("torch.").lower().replace("f8_", "float8_"))


def quantisation(values: Mapping[str, Any]) -> str | None:
    """Returns the method by which the values of a config.json say that the weights are quantised, or None."""
    for key in ("quantization_config", "compression_config"):
        if said := values.get(key):
            method = said.get("quant_method") if isinstance(said, dict) else said
            return str(method or key)[:80]
    return None


def is_parameter(name: str, parameters: Iterable[str]) -> bool:
    """Returns whether a stored tensor is one of the model's parameters, whose names may have or lack a prefix."""
    return any(f".{name}".endswith(f".{own}") or f".{own}".endswith(f".{name}") for own in parameters)


def quantised_weight(dtypes: Mapping[str, str], parameters: Collection[str]) -> str | None:
    """Returns the first stored tensor that is a weight and not of a plain float dtype, or None.

    dtypes: of all stored tensors by name, as `dtype_name` gives them. parameters: names of the model's. Integers beside
    the weights, such as a mask or a counter, are no weights.
    """
    for name, dtype in dtypes.items():
        if dtype in FLOATS:
            continue
        if dtype.startswith("float") or "weight" in name.rpartition(".")[2] or is_parameter(name, parameters):
            return name
    return None
