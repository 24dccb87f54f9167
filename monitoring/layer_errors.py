"""Errors of single layers: those of a row of `--stage align` by layer, and the largest of them in words."""

import math
from collections.abc import Mapping
from typing import Any

NAMED = 3  # layers that a line of the log names


def errors_by_layer(row: Mapping[str, Any]) -> dict[int, float]:
    """Returns the relative error of each aligned layer, NaN where a file has null; none for a row of another stage."""
    found = row.get("alignment") or {"layers": [], "errors": []}
    errors = [math.nan if error is None else error for error in found["errors"]]
    return dict(zip(found["layers"], errors, strict=True))


def mean_error(errors: Mapping[int, float]) -> float:
    return sum(errors.values()) / len(errors)


def worst_layers(errors: Mapping[int, float], n: int = NAMED) -> str:
    """Names the n layers with the largest errors, those whose error is not finite first: "10 (0.703), 4 (0.662)"."""
    order = sorted(errors, key=lambda layer: -errors[layer] if math.isfinite(errors[layer]) else -math.inf)
    return ", ".join(f"{layer} ({errors[layer]:.3f})" for layer in order[:n])
