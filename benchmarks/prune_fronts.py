"""Fronts of accuracy against cost, and how far apart two of them are at one accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.stats import t as student

Point = tuple[float, float]  # (accuracy, cost)


@dataclass(frozen=True)
class Cost:
    """What a front pays for an accuracy.

    Attributes:
        value: the cost.
        within: whether the front goes that far down; else ``value`` is that of its cheapest point, which is better.
    """

    value: float
    within: bool


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both, cheapest first.

    >>> front([(0.9, 5.0), (0.8, 2.0), (0.7, 3.0)])
    [(0.8, 2.0), (0.9, 5.0)]
    """
    found: list[Point] = []
    for accuracy, cost in sorted(points, key=lambda point: (point[1], -point[0])):
        if not found or accuracy > found[-1][0]:
            found.append((accuracy, cost))
    return found


def cost_at(points: Sequence[Point], accuracy: float) -> Cost:
    """The cost of ``accuracy``, between two points of the front by interpolation of the cost's logarithm.

    Raises:
        ValueError: where no point is that accurate.

    >>> cost_at([(0.8, 1.0), (0.9, 4.0)], 0.85), cost_at([(0.8, 1.0), (0.9, 4.0)], 0.7)
    (Cost(value=2.0, within=True), Cost(value=1.0, within=False))
    """
    known = front(points)
    if accuracy <= known[0][0]:
        return Cost(known[0][1], accuracy == known[0][0])
    for (low, cheap), (high, dear) in zip(known, known[1:], strict=False):
        if accuracy <= high:
            share = (accuracy - low) / (high - low)
            return Cost(math.exp((1 - share) * math.log(cheap) + share * math.log(dear)), True)
    raise ValueError(f"no point reaches {accuracy}")


def mean_ratio(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The geometric mean of one ratio per seed, and its 95 % interval by Student's t; NaN of a single one.

    >>> [round(x, 3) for x in mean_ratio([2.0, 2.0, 2.0])]
    [2.0, 2.0, 2.0]
    """
    logs = [math.log(ratio) for ratio in ratios]
    if len(logs) < 2:
        return math.exp(logs[0]), math.nan, math.nan
    half = float(student.ppf(0.975, len(logs) - 1)) * stdev(logs) / math.sqrt(len(logs))
    return tuple(math.exp(mean(logs) + sign * half) for sign in (0, -1, 1))  # type: ignore[return-value]
