"""The arithmetic of a study."""

from __future__ import annotations

from itertools import pairwise

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
