"""Compares the figures of a run with those of the same run on a CPU, at every step."""

from __future__ import annotations

import math

# How far a run's figures may be from the CPU's, relative to them: of losses (those of evaluations too), and of gradient
# norms, which are less averaged. Both runs round differently at every operation, and each update carries that on.
TOLERANCE = {"float32": (2e-3, 2e-2), "bfloat16": (2e-2, 1e-1), "float16": (5e-3, 5e-2)}
NORM = "gradient norm"

Differences = dict[str, tuple[float, int]]  # the largest of all steps, and its step, by figure


def figures(row: dict) -> dict[str, float | None]:
    """Returns what is compared of a step. That of a skipped update is None."""
    evaluation = {"held-out loss": row["eval"]["loss"]} if "eval" in row else {}
    return {"loss": row["loss"], NORM: row["grad_norm"], **evaluation}


def largest_differences(rows: list[dict], truths: list[dict]) -> Differences:
    """Returns the largest relative difference of each figure. A figure, or a step, that only one of both runs has
    differs without bound; evaluations count where both have them.
    """
    found: Differences = {}
    by_step = {row["step"]: figures(row) for row in truths}
    for row in rows:
        truth = by_step.get(row["step"], {})
        for name, value in figures(row).items():
            if name == "held-out loss" and name not in truth:
                continue
            difference = relative_difference(value, truth.get(name, math.nan))
            found[name] = max(found.get(name, (0.0, row["step"])), (difference, row["step"]))
    return found


def relative_difference(value: float | None, truth: float | None) -> float:
    if value is None or truth is None:
        return 0.0 if value is truth else math.inf
    difference = abs(value - truth) / abs(truth)
    return difference if math.isfinite(difference) else math.inf


def in_words(differences: Differences, dtype: str) -> tuple[str, bool]:
    """Returns the differences with what is allowed, and whether all are within that."""
    of_losses, of_norms = TOLERANCE[dtype]
    words, is_well = [], True
    for name, (difference, step) in differences.items():
        allowed = of_norms if name == NORM else of_losses
        is_well = is_well and difference <= allowed
        words.append(f"{name} by up to {difference:.2g} (step {step}; {allowed:g} is allowed)")
    return "differs from the CPU's: " + ", ".join(words), is_well
