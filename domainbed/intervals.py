"""95% intervals for a mean: Student's t and the bootstrap.

Written out, since ``scipy.stats`` takes a second to import.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np

LEVEL = 0.95
TOLERANCE = 1e-12  # numbers that are closer than that are the same: what rounding leaves of fractions

Interval = tuple[float, float]


def t_interval(values: Sequence[float]) -> Interval | None:
    """Student's t interval for the mean; None for fewer than two values, or if all are the same.

    Source: Student, The probable error of a mean, Biometrika 6 (1908).
    """
    if _says_nothing(values):
        return None
    mean, n = float(np.mean(values)), len(values)
    half = t_quantile(n - 1) * float(np.std(values, ddof=1)) / n**0.5
    return mean - half, mean + half


def bootstrap_interval(values: Sequence[float], seed: int = 0, resamples: int = 10_000) -> Interval | None:
    """Percentile bootstrap interval for the mean; None for fewer than two values, or if all are the same.

    With few values it is too short: of three, it never leaves their range and holds the mean about three times in four.

    Args:
        seed: of the resampling, so that equal values have equal intervals.

    Source: Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics 7 (1979).
    """
    if _says_nothing(values):
        return None
    n = len(values)
    drawn = np.random.default_rng(seed).integers(0, n, (resamples, n))
    means = np.asarray(values, dtype=float)[drawn].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _says_nothing(values: Sequence[float]) -> bool:
    return len(values) < 2 or not np.isfinite(values).all() or float(np.ptp(values)) <= TOLERANCE


@functools.cache
def t_quantile(df: int) -> float:
    """How many standard errors the interval reaches to either side, by bisection of the angle atan(t / sqrt(df))."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, df) < LEVEL else (low, angle)
    return math.tan(low) * df**0.5


def _within(angle: float, df: int) -> float:
    """P(|T| < sqrt(df) tan(angle)) of Student's t, which is a finite sum for whole degrees of freedom.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 26.7.3 and 26.7.4.
    """
    odd = df % 2
    cosine = math.cos(angle)
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, df, 2):  # the powers of the cosine grow by two
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
