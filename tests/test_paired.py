import itertools

import numpy as np
import pytest
from scipy import stats

from domainbed import paired


@pytest.fixture(params=[2, 3, 6, 10, 25])
def pairs(request):
    rng = np.random.default_rng(request.param)
    first = rng.uniform(size=request.param)
    return first, first - rng.normal(0.1, 0.2, size=request.param)


class TestDifference:
    def test_agrees_with_scipy(self, pairs):
        found = paired.difference(*pairs)
        differences = pairs[0] - pairs[1]
        n, mean, error = len(differences), differences.mean(), stats.sem(differences)
        assert (found.n, found.constant) == (n, False)
        assert found.mean == pytest.approx(mean)
        assert found.interval == pytest.approx(stats.t.interval(0.95, n - 1, mean, error))
        assert found.t_p == pytest.approx(stats.ttest_rel(*pairs).pvalue)
        assert (found.signed_rank_p is None) == (n < 6)

    def test_order_of_the_two_turns_the_sign_only(self, pairs):
        found, turned = paired.difference(*pairs), paired.difference(*pairs[::-1])
        assert turned.mean == -found.mean
        assert turned.interval == pytest.approx((-found.interval[1], -found.interval[0]))
        assert (turned.t_p, turned.signed_rank_p) == pytest.approx((found.t_p, found.signed_rank_p))

    def test_a_single_pair_has_neither_interval_nor_test(self):
        assert paired.difference([0.75], [0.5]) == paired.Difference(1, 0.25, None, False, None, None)

    def test_equal_pairs(self):
        assert paired.difference([0.5, 0.25], [0.5, 0.25]) == paired.Difference(2, 0, None, True, None, None)
        assert paired.difference([0.5] * 6, [0.5] * 6) == paired.Difference(6, 0, None, True, None, None)

    def test_one_difference_throughout_is_constant_despite_rounding(self):
        found = paired.difference([0.3, 0.4, 0.9], [0.1, 0.2, 0.7])  # .3 - .1 and .9 - .7 differ in the last bits
        assert len({0.3 - 0.1, 0.4 - 0.2, 0.9 - 0.7}) > 1
        assert found.mean == pytest.approx(0.2)
        assert (found.constant, found.interval, found.t_p) == (True, None, None)


class TestSignedRanks:
    @pytest.mark.parametrize("n", [6, 11, 30])
    def test_agrees_with_scipy_without_ties(self, n):
        differences = np.random.default_rng(n).normal(0.3, 1, size=n)
        assert paired.signed_ranks(differences) == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)

    @pytest.mark.parametrize(
        "differences",
        [[1, 1, 2, -2, 3, 3, 3], [0.3 - 0.1, 0.2, -0.2, 0.5, 0.7, 0.1, 0.9], [1] * 6, [-1, 2, 2, 0, 0, 4, 5, 5]],
    )
    def test_ties_and_zeros_against_all_signs(self, differences):
        some = np.array([round(d, 9) for d in differences if d])
        ranks = stats.rankdata(abs(some))
        signs = np.array(list(itertools.product([0, 1], repeat=len(some))))
        sums = (signs * ranks).sum(axis=1)
        own = ranks[some > 0].sum()
        tail = min(np.mean(sums <= own), np.mean(sums >= own))
        assert paired.signed_ranks(differences) == pytest.approx(min(1, 2 * tail))

    def test_nothing_but_zeros(self):
        assert paired.signed_ranks([0.0] * 7) is None


class TestHolm:
    def test_by_hand(self):
        # Sorted .005 .01 .03 .04 times 4 3 2 1 is .02 .03 .06 .04, and the last may not be below the third.
        assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])

    def test_one_test_needs_no_correction_and_none_exceeds_one(self):
        assert paired.holm([0.04]) == [0.04]
        assert paired.holm([0.7, 0.6]) == [1, 1]
        assert paired.holm([]) == []
