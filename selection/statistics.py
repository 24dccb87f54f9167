"""Means with their intervals. The units are texts, not tokens: tokens of one text are alike. Texts are few, so that the
interval is Student's.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

# 97.5% quantiles of Student's t, by its degrees of freedom from 1.
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
Z_975 = 1.959964


class Estimate(NamedTuple):
    """Holds a mean over n units, and half the width of its 95% interval: None of a single unit."""

    mean: float
    half: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.half is None else f"{self.mean:.3f} ± {self.half:.3f}"


def estimate(values: Sequence[float]) -> Estimate:
    """Returns the mean of some units and its interval by Student's t. Raises ValueError of none."""
    n = len(values)
    if n == 0:
        raise ValueError("an estimate of no values")
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean, t_975(n - 1) * math.sqrt(variance / n), n)


def t_975(df: int) -> float:
    """Returns the 97.5% quantile of Student's t: of the table, and beyond it by the expansion around a normal
    distribution's (Abramowitz and Stegun 26.7.5, two terms), which is right to 0.001 there.
    """
    if df <= len(T_975):
        return T_975[df - 1]
    z = Z_975
    return z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
