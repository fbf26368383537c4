"""Compare the speed of two calls fairly: interleaved, paired, with an interval for the ratio."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

Call = Callable[[], object]

_WARM_UP = 3
_SHORTEST_MS = 2.0  # a sample is as many calls as take so long: single short calls are mostly noise of the clock
_FEWEST_PAIRS = 7
_RESAMPLES = 2000
_LEVEL = 0.95


@dataclass(frozen=True)
class Comparison:
    """Latencies of two calls, sample by sample.

    Attributes:
        label: what was compared, for people.
        first, second: milliseconds per call; ``first[i]`` and ``second[i]`` are of one block of samples, see
            :func:`compare`.
    """

    label: str
    first: tuple[float, ...]
    second: tuple[float, ...]

    @property
    def first_ms(self) -> float:
        """Median of the first."""
        return statistics.median(self.first)

    @property
    def second_ms(self) -> float:
        """Median of the second."""
        return statistics.median(self.second)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Second by first, pair by pair."""
        return tuple(b / a for a, b in zip(self.first, self.second, strict=True))

    @property
    def ratio(self) -> float:
        """Median over the pairs of second by first."""
        return statistics.median(self.ratios)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Bootstrap interval of :attr:`ratio` that holds 95 % of 2,000 resamples (drawn with a fixed seed).

        >>> low, high = Comparison("x", (1.0,) * 9, (2.0,) * 9).interval
        >>> float(low), float(high)
        (2.0, 2.0)
        """
        ratios = np.asarray(self.ratios)
        drawn = np.random.default_rng(0).integers(len(ratios), size=(_RESAMPLES, len(ratios)))
        low, high = np.quantile(np.median(ratios[drawn], axis=1), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
        return float(low), float(high)

    @property
    def verdict(self) -> str:
        """``slower``, ``faster`` (the second, with the whole interval on one side of 1), or ``as fast``."""
        low, high = self.interval
        return "slower" if low > 1 else "faster" if high < 1 else "as fast"

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-able: samples and what follows from them."""
        return {
            "label": self.label,
            "first_ms": self.first_ms,
            "second_ms": self.second_ms,
            "ratio": self.ratio,
            "interval": list(self.interval),
            "pairs": len(self.first),
            "samples_ms": [list(self.first), list(self.second)],
        }

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.label}: {self.first_ms:.3f} ms, {self.second_ms:.3f} ms, ratio {self.ratio:.3f} "
            f"(95 %: {low:.3f} to {high:.3f}, {len(self.first)} pairs)"
        )


def compare(label: str, first: Call, second: Call, *, pairs: int = 50, seconds: float | None = None) -> Comparison:
    """Time ``first`` and ``second`` in blocks of four samples, first, second, second, first, and pair their means.

    So a slow moment of the machine hits both, and what a call finds in the caches, which depends on whose turn it was
    before, hits both alike.

    Args:
        label: the name for the result.
        first, second: called without arguments; must not return before their work is done.
        pairs: how often each is timed, after a few calls to warm up; at least 2.
        seconds: stop after so long, with fewer pairs, but not with fewer than seven.

    Raises:
        ValueError: when ``pairs`` is below 2, for which there is no spread.

    >>> compare("sleep", lambda: time.sleep(0.001), lambda: time.sleep(0.002), pairs=5).ratio > 1
    True
    """
    if pairs < 2:
        raise ValueError(f"pairs must be at least 2, got {pairs}")
    calls = []
    for call in (first, second):
        for _ in range(_WARM_UP):
            call()
        calls.append(math.ceil(_SHORTEST_MS / max(sample(call), 1e-3)))
    together = max(calls)  # as many of each: caches and clocks then treat them alike
    ends = math.inf if seconds is None else time.perf_counter() + seconds
    taken: list[tuple[float, float]] = []
    first()  # with which every later block finds the caches
    while len(taken) < pairs and (len(taken) < min(pairs, _FEWEST_PAIRS) or time.perf_counter() < ends):
        a, b, d, c = (sample(call, together) for call in (first, second, second, first))
        taken.append(((a + c) / 2, (b + d) / 2))
    firsts, seconds_ = zip(*taken, strict=True)
    return Comparison(label, firsts, seconds_)


def sample(call: Call, calls: int = 1) -> float:
    """Milliseconds per call, over ``calls`` of them in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) * 1e3 / calls
