"""Intervals against scipy's."""

import pytest
from scipy import stats

from selection.statistics import Estimate, estimate, t_975


@pytest.mark.parametrize("df", [1, 2, 3, 7, 29, 30, 31, 60, 1000])
def test_quantiles_are_students(df):
    assert t_975(df) == pytest.approx(stats.t.ppf(0.975, df), abs=1e-3)


def test_an_interval_is_students():
    values = [1.0, 2.5, 2.0, 4.0]
    low, high = stats.t.interval(0.95, 3, loc=2.375, scale=stats.sem(values))
    found = estimate(values)
    assert (found.mean, found.n) == (2.375, 4) and found.half == pytest.approx((high - low) / 2, rel=1e-3)
    assert str(found) == "2.375 ± 1.989"


def test_a_single_unit_has_no_interval():
    assert estimate([0.5]) == Estimate(0.5, None, 1) and str(estimate([0.5])) == "0.500"
    with pytest.raises(ValueError, match="no values"):
        estimate([])
