"""The arithmetic of a study."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from amft_fast.controller.statistics import student_t975


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval over seeds (Student's t); the half-width of one value is NaN."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, float("nan")
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    return mean, student_t975(n - 1) * (variance / n) ** 0.5


def area_under_curve(points: list[tuple[float, float]], budget: float) -> float:
    """Mean success over the compute spent, from (tokens, success) points: trapezoids, up to `budget`, last value held."""
    points = sorted((min(x, budget), y) for x, y in points)
    if points[-1][0] < budget:
        points.append((budget, points[-1][1]))
    area = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(points))
    return area / (points[-1][0] - points[0][0]) if points[-1][0] > points[0][0] else points[-1][1]


class Difference(NamedTuple):
    """A mean paired difference over `seeds` seeds, and the half-width of its 95 % interval (NaN of one seed)."""

    seeds: int
    mean: float
    half: float


def paired(a: dict[int, float], b: dict[int, float]) -> Difference:
    """a - b over the seeds that both have; raises ValueError where there is none."""
    common = sorted(a.keys() & b.keys())
    if not common:
        raise ValueError(f"no seed in common: {sorted(a)} and {sorted(b)}")
    return Difference(len(common), *interval([a[s] - b[s] for s in common]))


def pooled_half(scores: Sequence[dict[int, float]]) -> float:
    """Half-width of the 95 % interval of a paired difference between any two of these arms, over the seeds all have.

    The spread is that of all arms together: what is left of the scores once each arm's mean and each seed's mean are taken
    off, on (arms - 1) (seeds - 1) degrees of freedom. NaN of one arm or one seed.
    """
    seeds = sorted(set.intersection(*(set(arm) for arm in scores))) if scores else []
    freedom = (len(scores) - 1) * (len(seeds) - 1)
    if freedom < 1:
        return float("nan")
    table = [[arm[s] for s in seeds] for arm in scores]
    rows = [sum(row) / len(seeds) for row in table]
    columns = [sum(column) / len(table) for column in zip(*table)]
    mean = sum(rows) / len(rows)
    rest = sum((y - r - c + mean) ** 2 for row, r in zip(table, rows) for y, c in zip(row, columns))
    return student_t975(freedom) * (2 * rest / freedom / len(seeds)) ** 0.5


def reported_split(end: dict[str, Any]) -> str:
    """The split by which methods are ranked, of those that the evaluation at the end has: test where there is one, else val,
    else the first."""
    return next((split for split in ("test", "val") if split in end), next(iter(end)))
