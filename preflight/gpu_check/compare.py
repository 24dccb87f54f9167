"""Compares the figures of a run with those of the same run on a CPU, at every step."""

from __future__ import annotations

import math

# How far a run's figures may be from the CPU's, relative to them: losses at every step, those of evaluations too, and
# the gradient norm of the first step. Both runs round differently at every operation, and each update carries that on.
# On a CPU (2026-11-30) the run in bfloat16 differed from that in float32 by up to 0.9% and 0.6%, in float16 by 0.14%
# and 0.05%; a run without updates by up to 16%. Allowed is about three times that. float32 has the figures of float16:
# Triton multiplies it in TF32, of as many bits. Later norms say nothing: they differ by 50% where losses agree.
TOLERANCE = {"float32": (0.005, 0.01), "float16": (0.005, 0.01), "bfloat16": (0.03, 0.05)}
NORM = "first gradient norm"

Differences = dict[str, tuple[float, int]]  # the largest of all steps, and its step, by figure


def figures(row: dict) -> dict[str, float | None]:
    """Returns what is compared of a step. That of a skipped update is None."""
    evaluation = {"held-out loss": row["eval"]["loss"]} if "eval" in row else {}
    return {"loss": row["loss"], **({NORM: row["grad_norm"]} if row["step"] == 1 else {}), **evaluation}


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
    if not any(difference for difference, _ in differences.values()):
        return f"equals the CPU's in every bit: {', '.join(differences)}", True
    for name, (difference, step) in differences.items():
        allowed = of_norms if name == NORM else of_losses
        is_well = is_well and difference <= allowed
        words.append(f"{name} by up to {difference:.2g} (step {step}; {allowed:g} is allowed)")
    return "differs from the CPU's: " + ", ".join(words), is_well
