"""Statistics of ranks: methods over several datasets, Friedman's test, Nemenyi's critical difference."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05  # of the critical difference


@dataclass(frozen=True)
class Ranks:
    """How methods rank over datasets.

    Attributes:
        mean: rank of each method, averaged over the datasets; 1 is best.
        friedman_p: p of "all methods are alike"; None for one method or dataset, or if every dataset ties all methods.
        critical_difference: mean ranks that differ by less are not told apart, at LEVEL; None like the p.
        n: number of datasets.
    """

    mean: list[float]
    friedman_p: float | None
    critical_difference: float | None
    n: int


def average_ranks(scores: Sequence[Sequence[float]]) -> Ranks:
    """Ranks of k methods over N datasets.

    Args:
        scores: (N, k), higher is better; equal scores share their mean rank.

    Source: Demsar, Statistical comparisons of classifiers over multiple data sets, JMLR 7 (2006).
    """
    if not len(scores):
        return Ranks([], None, None, 0)
    ranks = np.array([_ranks(row) for row in scores])  # (N, k)
    n, k = ranks.shape
    p = _friedman(ranks)
    difference = None if p is None else nemenyi_q(k) * math.sqrt(k * (k + 1) / (6 * n))
    return Ranks([float(rank) for rank in ranks.mean(axis=0)], p, difference, n)


def _ranks(scores: Sequence[float]) -> list[float]:
    """The rank of each score, the highest first; ties, also those up to rounding, share their mean rank."""
    some = np.round(np.asarray(scores, dtype=float), 12)
    return [float((some > score).sum() + ((some == score).sum() + 1) / 2) for score in some]


def _friedman(ranks: np.ndarray) -> float | None:
    """p of Friedman's chi-squared test, corrected for ties.

    Source: Friedman, The use of ranks to avoid the assumption of normality, JASA 32 (1937).
    """
    from scipy.special import chdtrc

    n, k = ranks.shape
    spread = float(((ranks - (k + 1) / 2) ** 2).sum()) / (n * (k - 1)) if k > 1 else 0.0  # k (k + 1) / 12 without ties
    if n < 2 or spread == 0:
        return None
    statistic = n * float(((ranks.mean(axis=0) - (k + 1) / 2) ** 2).sum()) / spread
    return float(chdtrc(k - 1, statistic))


@functools.cache
def nemenyi_q(k: int) -> float:
    """The critical value of the studentized range of k means with infinite degrees of freedom over the root of two.

    Solved by bisection; SciPy's own takes seconds.
    """
    low, high = 0.0, 20.0
    for _ in range(50):
        q = (low + high) / 2
        low, high = (q, high) if _range_below(q, k) < 1 - LEVEL else (low, q)
    return low / math.sqrt(2)


def _range_below(q: float, k: int) -> float:
    """P(range of k standard normal numbers < q): k times the integral of phi(z) (Phi(z) - Phi(z - q))^(k - 1)."""
    from scipy.special import ndtr

    z = np.linspace(-8, 8 + q, 4001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    return float(k * (z[1] - z[0]) * (density * (ndtr(z) - ndtr(z - q)) ** (k - 1)).sum())
