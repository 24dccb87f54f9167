"""Thinning, smoothing and axes of long series."""

import numpy as np
import pytest

from report_page.run_data import Series
from report_page.series import is_log, smooth, smoothing_width, thin


def test_thinning_keeps_every_extreme_and_the_gaps():
    values = np.sin(np.arange(10_000) / 300)
    values[1234], values[8765] = 50, -50
    values[5000:5200] = np.nan
    thinned = thin(Series(np.arange(10_000), values), buckets=100)
    assert len(thinned.step) <= 200 and np.all(np.diff(thinned.step) > 0)
    assert thinned.value[thinned.step == 1234] == 50 and thinned.value[thinned.step == 8765] == -50
    assert np.isnan(thinned.value).sum() == 2  # two whole stretches of a hundred
    shown = ~np.isnan(thinned.value)
    assert np.array_equal(thinned.value[shown], values[thinned.step[shown]])


def test_a_short_series_is_not_thinned():
    series = Series(np.arange(200), np.arange(200.0))
    assert thin(series, buckets=100) is series


def test_smoothing_is_a_running_median():
    values = np.arange(2000.0)
    values[700] = 1e30
    values[900] = np.nan
    smoothed = smooth(Series(np.arange(1, 2001), values), places=50)
    assert smoothing_width(2000) == 41 and len(smoothed.step) == 50
    assert (smoothed.step[0], smoothed.step[-1]) == (1, 2000)
    assert np.abs(smoothed.value[1:-1] - (smoothed.step[1:-1] - 1)).max() <= 1
    assert smoothed.value[0] == 10 and smoothed.value[-1] == 1989  # of the half of the window that there is


def test_the_window_grows_with_the_run():
    assert [smoothing_width(n) for n in (1, 29, 30, 449, 500, 100_000)] == [1, 1, 9, 9, 11, 2001]


def test_few_rows_are_shown_as_they_are_and_a_stretch_without_values_stays_one():
    series = Series(np.arange(29), np.arange(29.0))
    assert smooth(series) is series
    assert np.isnan(smooth(Series(np.arange(100), np.full(100, np.nan))).value).all()


@pytest.mark.parametrize(
    "values,expected",
    [([1, 30], True), ([1, 29], False), ([0, 100], False), ([-1, 100], False), ([np.nan, 1, 50], True), ([], False)],
)
def test_an_axis_is_logarithmic_for_what_is_positive_and_far_apart(values, expected):
    assert is_log(np.array(values, dtype=float)) is expected
