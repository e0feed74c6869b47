"""The arithmetic of evidence."""

from __future__ import annotations

import math

import numpy as np

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def student_t975(freedom: float) -> float:
    """Student's t at 97.5 %, for at least 1 degree of freedom, between whole numbers linear in 1/ν; 1.96 in the limit."""
    low = int(freedom)
    if low >= len(T975):
        return 1.96 + (T975[-1] - 1.96) * len(T975) / freedom
    share = (1 / low - 1 / freedom) / (1 / low - 1 / (low + 1))
    return T975[low - 1] + share * (T975[low] - T975[low - 1])


def ratio(a: float, b: float) -> float:
    """a / b, and 0 where b is 0: a utility without spread, or a gradient that vanished, says nothing."""
    return a / b if b != 0 else 0.0


def signed_rank(values: np.ndarray) -> float:
    """Wilcoxon's statistic of paired differences as a standard normal: the sum of the ranks of |v| with the signs of v over its
    standard deviation where each sign is a coin's. A few large values weigh no more than the largest ranks."""
    n, size = len(values), np.abs(values)
    if n == 0:
        return 0.0
    ranks = np.searchsorted(np.sort(size), size, side="left") + np.searchsorted(np.sort(size), size, side="right")
    total = float((np.sign(values) * (ranks + 1) / 2).sum())  # equal sizes share their mean rank
    return total / math.sqrt(n * (n + 1) * (2 * n + 1) / 6)


def student(values: np.ndarray) -> float:
    """Mean over its standard error; 0 where there is no spread to judge by."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) / error if error > 0 else 0.0
