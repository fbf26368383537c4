"""Fronts of accuracy against cost, means of them over seeds, and how far apart two of them are at one accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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

    >>> round(cost_at([(0.8, 1.0), (0.9, 4.0)], 0.85).value, 3), cost_at([(0.8, 1.0), (0.9, 4.0)], 0.7)
    (2.0, Cost(value=1.0, within=False))
    """
    known = front(points)
    if accuracy <= known[0][0]:
        return Cost(known[0][1], accuracy == known[0][0])
    for (low, cheap), (high, dear) in zip(known, known[1:], strict=False):
        if accuracy <= high:
            share = (accuracy - low) / (high - low)
            return Cost(math.exp((1 - share) * math.log(cheap) + share * math.log(dear)), True)
    raise ValueError(f"no point reaches {accuracy}")


def mean_points(seeds: Sequence[Sequence[Point]]) -> list[Point]:
    """Point by point, the mean accuracy and the geometric mean of the costs; every seed has the same points in order.

    >>> mean_points([[(0.5, 1.0)], [(0.7, 4.0)]])
    [(0.6, 2.0)]
    """
    found = []
    for same in zip(*seeds, strict=True):
        accuracies, costs = zip(*same, strict=True)
        found.append((mean(accuracies), math.exp(mean(math.log(cost) for cost in costs))))
    return found


def jackknife(ratio: Callable[[Sequence[int]], float], seeds: Sequence[int]) -> tuple[float, float, float]:
    """``ratio`` of all seeds, and a 95 % interval: from what it is without each of them (Tukey, 1958), in logarithms.

    >>> [round(x, 3) for x in jackknife(lambda seeds: 2.0, [0, 1, 2])]
    [2.0, 2.0, 2.0]
    """
    whole, count = math.log(ratio(seeds)), len(seeds)
    if count < 2:
        return math.exp(whole), math.nan, math.nan
    without = [math.log(ratio([other for other in seeds if other != seed])) for seed in seeds]
    half = float(student.ppf(0.975, count - 1)) * stdev(without) * (count - 1) / math.sqrt(count)
    return tuple(math.exp(whole + sign * half) for sign in (0, -1, 1))  # type: ignore[return-value]
