"""Compare the speed of two callables fairly: interleaved, paired, with the spread of the ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

_WARM_UP = 5


@dataclass(frozen=True)
class Comparison:
    """Latencies of two models in one runtime, in milliseconds.

    ``ratio`` is the median over the pairs of converted / original; half of all pairs lie between ``ratio_low``
    and ``ratio_high`` (the quartiles).
    """

    runtime: str
    original_ms: float
    converted_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int

    def __str__(self) -> str:
        return (
            f"{self.runtime}: original {self.original_ms:.3f} ms, plain {self.converted_ms:.3f} ms, "
            f"ratio {self.ratio:.2f} (half of {self.pairs} pairs within {self.ratio_low:.2f} to {self.ratio_high:.2f})"
        )


def compare(
    runtime: str, original: Callable[[], object], converted: Callable[[], object], *, pairs: int = 50
) -> Comparison:
    """Time ``original`` and ``converted`` in alternation, so that a slow moment of the machine hits both.

    Args:
        runtime: the name for the result.
        original, converted: called without arguments; must not return before their work is done.
        pairs: how often each is timed, after a few calls to warm up; at least 2.

    Raises:
        ValueError: when ``pairs`` is below 2, for which there is no spread.

    >>> compare("sleep", lambda: time.sleep(0.001), lambda: time.sleep(0.002), pairs=5).ratio > 1
    True
    """
    if pairs < 2:
        raise ValueError(f"pairs must be at least 2, got {pairs}")
    for _ in range(_WARM_UP):
        original()
        converted()
    firsts, seconds = [], []
    for i in range(pairs):
        if i % 2 == 0:  # who goes first alternates, too: the second finds warm caches
            firsts.append(_milliseconds(original))
            seconds.append(_milliseconds(converted))
        else:
            seconds.append(_milliseconds(converted))
            firsts.append(_milliseconds(original))
    low, middle, high = statistics.quantiles([b / a for a, b in zip(firsts, seconds, strict=True)], n=4)
    return Comparison(runtime, statistics.median(firsts), statistics.median(seconds), middle, low, high, pairs)


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3
