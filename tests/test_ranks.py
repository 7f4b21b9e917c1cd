"""Ranks against SciPy, and against the critical values that Demsar printed."""

import math

import numpy as np
import pytest
from scipy import stats

from domainbed.ranks import average_ranks, nemenyi_q

DEMSAR = {2: 1.960, 3: 2.343, 4: 2.569, 5: 2.728, 6: 2.850, 7: 2.949, 8: 3.031, 9: 3.102, 10: 3.164}  # his table 5a


@pytest.mark.parametrize(("k", "q"), DEMSAR.items())
def test_critical_values(k, q):
    assert nemenyi_q(k) == pytest.approx(q, abs=1e-3)


def test_critical_value_is_scipys():
    assert nemenyi_q(5) == pytest.approx(stats.studentized_range.ppf(0.95, 5, math.inf) / math.sqrt(2), rel=1e-6)


@pytest.mark.parametrize("decimals", [1, 6])  # one decimal: many ties
def test_ranks_and_friedman_are_scipys(decimals):
    scores = np.random.default_rng(0).random((9, 4)).round(decimals)
    found = average_ranks(scores.tolist())
    assert found.mean == pytest.approx(stats.rankdata(-scores, axis=1).mean(axis=0))
    assert found.friedman_p == pytest.approx(stats.friedmanchisquare(*scores.T).pvalue)
    assert found.n == 9


def test_critical_difference_of_demsars_example():
    scores = np.random.default_rng(1).random((14, 4))
    assert average_ranks(scores.tolist()).critical_difference == pytest.approx(1.25, abs=0.01)  # his section 3.2.2


def test_the_best_is_first_and_ties_share():
    assert average_ranks([[0.9, 0.1, 0.9], [0.3, 0.2, 0.1]]).mean == [1.25, 2.5, 2.25]


def test_means_that_differ_by_rounding_alone_tie():
    low, high = np.mean([0.1, 0.2, 0.3]), np.mean([0.3, 0.2, 0.1])
    assert low != high
    assert average_ranks([[low, high, 0.1]] * 6).mean == [1.5, 1.5, 3]


def test_too_little_for_a_test():
    assert average_ranks([]).n == 0
    one = average_ranks([[0.1, 0.2]])
    assert (one.mean, one.friedman_p, one.critical_difference) == ([2.0, 1.0], None, None)
    alike = average_ranks([[0.1, 0.1], [0.2, 0.2]])
    assert (alike.mean, alike.friedman_p) == ([1.5, 1.5], None)
    assert average_ranks([[0.1], [0.2]]).friedman_p is None


def test_two_methods():
    found = average_ranks([[1, 0]] * 4)
    statistic = 12 * 4 / (2 * 3) * (1**2 + 2**2 - 2 * 3**2 / 4)
    assert found.friedman_p == pytest.approx(math.erfc(math.sqrt(statistic / 2)))
