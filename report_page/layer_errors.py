"""Reads how far single layers are from the teacher's: the layer maps of a run, and the errors that every row of the
stage `align` has. A long alignment is shortened to as many columns as a picture can show.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from report_page.lenient import dict_or_empty, finite_or_nan

MAPS = ("own", "stream")
MOST_LAYERS = 10_000  # of a model; a row that names more is damaged
COLUMNS = 300  # of a picture of errors over steps
LAST_ROWS = 10  # whose median is the error at the end

Rows = Sequence[Mapping[str, Any]]


class LayerErrors(NamedTuple):
    """Holds how far each layer is from the teacher's, at some steps."""

    step: NDArray  # (n,)
    error: NDArray  # (layers, n); NaN where a layer has none


class Alignment(NamedTuple):
    """Holds the errors of the aligned layers of a run, relative to the attention's output."""

    errors: LayerErrors  # means over up to COLUMNS stretches of rows
    mean: NDArray  # (rows,), over the layers of a row; NaN where a row has none
    worst: NDArray  # (rows,), the largest of them
    first: dict[int, float]  # by layer: in the first row that has it, before any update
    last: dict[int, float]  # by layer: median of the last LAST_ROWS rows


def layer_maps_in(rows: Rows) -> dict[str, LayerErrors]:
    """Returns the layer maps by those of MAPS that the rows have."""
    return {kind: found for kind in MAPS if (found := _layer_map(rows, kind))}


def _layer_map(rows: Rows, kind: str) -> LayerErrors | None:
    maps = [(row["step"], row["layer_map"][kind]) for row in rows if _has_map(row.get("layer_map"), kind)]
    if not maps:
        return None
    error = np.full((max(len(column) for _, column in maps), len(maps)), math.nan)
    for i, (_, column) in enumerate(maps):
        error[: len(column), i] = [finite_or_nan(value) for value in column]
    return LayerErrors(np.array([step for step, _ in maps], dtype=float), error)


def _has_map(found: Any, kind: str) -> bool:
    return isinstance(found, dict) and isinstance(found.get(kind), list) and 0 < len(found[kind]) <= MOST_LAYERS


# Alignment


def alignment_in(rows: Rows) -> Alignment | None:
    """Returns what the rows say of aligned layers; None for a run of another stage."""
    by_row = [_errors_in(row) for row in rows]
    having = [(row["step"], errors) for row, errors in zip(rows, by_row, strict=True) if errors]
    if not having:
        return None
    layers = sorted(set().union(*(errors for _, errors in having)))
    first: dict[int, float] = {}
    for _, errors in having:
        for layer, error in errors.items():
            if math.isfinite(error):
                first.setdefault(layer, error)
    tail = [errors for _, errors in having[-LAST_ROWS:]]
    last = {layer: _median([errors.get(layer, math.nan) for errors in tail]) for layer in layers}
    none = [math.nan]
    return Alignment(
        _over_steps(having, layers[-1] + 1),
        np.array([np.mean(list(errors.values()) or none) for errors in by_row]),
        np.array([np.max(list(errors.values()) or none) for errors in by_row]),
        {layer: first.get(layer, math.nan) for layer in layers},
        last,
    )


def _errors_in(row: Mapping[str, Any]) -> dict[int, float]:
    """Returns the errors of a row by layer; none if the row has none that can be used."""
    found = dict_or_empty(row.get("alignment"))
    layers, errors = found.get("layers"), found.get("errors")
    if not isinstance(layers, list) or not isinstance(errors, list):
        return {}
    pairs = zip(layers, errors, strict=False)
    return {layer: finite_or_nan(error) for layer, error in pairs if type(layer) is int and 0 <= layer < MOST_LAYERS}


def _over_steps(having: Sequence[tuple[float, dict[int, float]]], n_layers: int) -> LayerErrors:
    """Returns each layer's mean error in up to COLUMNS stretches of rows, at the middle of their steps."""
    column = np.arange(len(having)) * min(COLUMNS, len(having)) // len(having)  # of each row
    n = int(column[-1]) + 1
    sums, counts = np.zeros((n_layers, n)), np.zeros((n_layers, n))
    for i, (_, errors) in zip(column, having, strict=True):
        for layer, error in errors.items():
            if math.isfinite(error):
                sums[layer, i] += error
                counts[layer, i] += 1
    steps = np.bincount(column, [step for step, _ in having]) / np.bincount(column)
    return LayerErrors(steps, np.divide(sums, counts, out=np.full_like(sums, math.nan), where=counts > 0))


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.median(known)) if known else math.nan
