"""Intervals against SciPy."""

import numpy as np
import pytest
from scipy import stats

from domainbed import intervals

VALUES = [0.61, 0.64, 0.58, 0.7, 0.66]


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 10, 29, 30, 500])
def test_quantiles_are_scipys(df):
    assert intervals.t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_t_interval_is_scipys(n):
    some = VALUES[:n]
    expected = stats.t.interval(0.95, n - 1, loc=np.mean(some), scale=stats.sem(some))
    assert intervals.t_interval(some) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", [0, 3])
def test_bootstrap_interval_is_scipys(seed):
    expected = stats.bootstrap(
        (VALUES,), np.mean, method="percentile", n_resamples=2000, rng=np.random.default_rng(seed)
    ).confidence_interval
    assert intervals.bootstrap_interval(VALUES, seed, 2000) == pytest.approx(tuple(expected), rel=1e-9)


def test_bootstrap_is_the_same_every_time_and_depends_on_the_seed():
    assert intervals.bootstrap_interval(VALUES) == intervals.bootstrap_interval(VALUES)
    assert intervals.bootstrap_interval(VALUES, 1, 50) != intervals.bootstrap_interval(VALUES, 2, 50)


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.5, 0.5], [0.1 + 0.2, 0.3], [0.5, float("nan")]])
@pytest.mark.parametrize("interval", [intervals.t_interval, intervals.bootstrap_interval])
def test_no_interval_where_the_spread_is_not_known(interval, values):
    assert interval(values) is None
