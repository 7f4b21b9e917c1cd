"""Statistics of paired numbers: the mean difference with its intervals, two tests, Holm's correction for many tests.

Written out, since ``scipy.stats`` takes a second to import; only Student's t is SciPy's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from domainbed.intervals import TOLERANCE, bootstrap_interval, t_interval

LEAST_FOR_SIGNED_RANKS = 6  # with five pairs, signed ranks can't give p below 2 / 2^5 = .0625


@dataclass(frozen=True)
class Difference:
    """The first numbers minus the second, pair by pair.

    Attributes:
        n: number of pairs.
        mean: of the differences.
        interval: t interval for the mean; None for one pair, or if all differences are the same.
        constant: there are several pairs and all differences are the same.
        t_p: two-sided p of the paired t-test; None like the interval.
        signed_rank_p: two-sided p of Wilcoxon's signed-rank test; None with fewer than LEAST_FOR_SIGNED_RANKS pairs,
            or if nothing differs.
        bootstrap: percentile bootstrap interval for the mean, with a fixed seed; None like the t interval.
    """

    n: int
    mean: float
    interval: tuple[float, float] | None
    constant: bool
    t_p: float | None
    signed_rank_p: float | None
    bootstrap: tuple[float, float] | None = None


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """What the pairs say of the difference between the first numbers and the second; at least one pair.

    Source: Student, The probable error of a mean, Biometrika 6 (1908); the t-test on the differences.
    """
    from scipy.special import stdtr  # tails of Student's t

    assert len(first) == len(second) > 0
    differences = np.subtract(first, second)  # (n,)
    n, mean = len(differences), float(differences.mean())
    constant = n > 1 and float(np.ptp(differences)) <= TOLERANCE
    signed_rank_p = signed_ranks(differences.tolist()) if n >= LEAST_FOR_SIGNED_RANKS else None
    interval = t_interval(differences.tolist())
    if interval is None:
        return Difference(n, mean, None, constant, None, signed_rank_p)
    t = -abs(mean) / (float(differences.std(ddof=1)) / n**0.5)
    bootstrap = bootstrap_interval(differences.tolist())
    return Difference(n, mean, interval, False, 2 * float(stdtr(n - 1, t)), signed_rank_p, bootstrap)


def signed_ranks(differences: Sequence[float]) -> float | None:
    """Exact two-sided p of Wilcoxon's signed-rank test; ties share their mean rank, and zeros are left out.

    The distribution is that over all signs of the ranks at hand, so that it is exact with ties, too.

    Returns:
        None if all differences are zero.

    Source: Wilcoxon, Individual comparisons by ranking methods, Biometrics Bulletin 1 (1945).
    """
    some = np.asarray(differences, dtype=float)
    some = some[np.abs(some) > TOLERANCE]
    if not len(some):
        return None
    _, place, count = np.unique(np.round(np.abs(some), 12), return_inverse=True, return_counts=True)
    ranks = (2 * np.cumsum(count) - count + 1)[place]  # twice the mean rank, an integer
    probability = np.ones(1)  # of each sum of the ranks with a positive sign
    for rank in ranks:
        shifted = np.concatenate([np.zeros(rank), probability])
        probability = (np.pad(probability, (0, rank)) + shifted) / 2
    positive = int(ranks[some > 0].sum())
    tail = min(probability[: positive + 1].sum(), probability[positive:].sum())
    return min(1.0, 2 * float(tail))


def holm(p: Sequence[float]) -> list[float]:
    """The p-values corrected so that the chance of any false claim among them stays below the level.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    order = np.argsort(p, kind="stable")
    steps = np.asarray(p, dtype=float)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return [float(value) for value in corrected]
