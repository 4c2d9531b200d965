"""What the same examples before and after say: intervals and p-values of a paired change."""

from __future__ import annotations

import functools
import math
import statistics

import numpy as np


def _is_binary(*arrays: np.ndarray) -> bool:
    return all(bool(((array == 0) | (array == 1)).all()) for array in arrays)


def paired_interval(before: np.ndarray, after: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Return a confidence interval of the mean of after - before, of the same examples.

    For values of 0 and 1, with b examples that rise and c that fall of n: d +- z sqrt((p + q - d^2) / (n + 2)),
    p = (b + 1) / (n + 2), q = (c + 1) / (n + 2), d = p - q. Otherwise mean +- t sd / sqrt(n).

    Args:
        before: values, shape (n,).
        after: values, shape (n,).
        level: the coverage, in (0, 1).

    Source:
        Bonett and Price, 2012.
    """
    n = len(before)
    if _is_binary(before, after):
        rise = (float((after > before).sum()) + 1) / (n + 2)
        fall = (float((after < before).sum()) + 1) / (n + 2)
        d = rise - fall
        half = statistics.NormalDist().inv_cdf((1 + level) / 2) * math.sqrt((rise + fall - d * d) / (n + 2))
        return max(-1.0, d - half), min(1.0, d + half)
    if n < 2:
        return -math.inf, math.inf
    difference = after - before
    half = student_quantile((1 + level) / 2, n - 1) * float(difference.std(ddof=1)) / math.sqrt(n)
    return float(difference.mean()) - half, float(difference.mean()) + half


def paired_p_value(before: np.ndarray, after: np.ndarray) -> float:
    """Return the two-sided p-value of no change between the same examples.

    McNemar's exact test for values of 0 and 1 (binomial in the examples that changed), the paired t-test otherwise.

    Args:
        before: values, shape (n,).
        after: values, shape (n,).

    Source:
        McNemar, 1947.
    """
    if _is_binary(before, after):
        rise, fall = int((after > before).sum()), int((after < before).sum())
        changed = rise + fall
        logs = [
            math.lgamma(changed + 1) - math.lgamma(i + 1) - math.lgamma(changed - i + 1) - changed * math.log(2)
            for i in range(min(rise, fall) + 1)
        ]
        return min(1.0, 2 * math.fsum(map(math.exp, logs)))
    difference = after - before
    if len(difference) < 2 or not difference.any():
        return 1.0
    spread = float(difference.std(ddof=1))
    if spread == 0:
        return 0.0
    t = float(difference.mean()) / (spread / math.sqrt(len(difference)))
    return max(0.0, 2 * (1 - student_cdf(abs(t), len(difference) - 1)))  # to about 1e-15: rounding could pass 0


def student_cdf(t: float, degrees: int) -> float:
    """Return the distribution function of Student's t for a whole number of degrees of freedom.

    The finite series of Abramowitz and Stegun (1964), 26.7.3 and 26.7.4, in powers of cos(theta)^2,
    theta = atan(t / sqrt(degrees)).
    """
    theta = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    steps = np.arange((degrees - 2 - odd) // 2 if degrees > 1 else 0, dtype=float)
    ratios = (2 * steps + 1 + odd) / (2 * steps + 2 + odd)
    series = 1 + float(np.cumprod(ratios * cosine**2).sum())
    if odd:
        series = 2 / math.pi * (theta + (sine * cosine * series if degrees > 1 else 0.0))
        return (1 + series) / 2
    return (1 + sine * series) / 2


@functools.lru_cache
def student_quantile(p: float, degrees: int) -> float:
    """Return the quantile of Student's t, p in (0.5, 1), by bisection of its distribution function."""
    low, high = 0.0, 1.0
    while student_cdf(high, degrees) < p:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        if student_cdf(middle, degrees) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2
