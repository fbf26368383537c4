"""Which sets go: those that say least, or least for what they cost, in chunks that leave widths a target likes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from rmfx.pruning.spaces import Costs, Space


@dataclass(frozen=True, eq=False)
class Step:
    """One chunk that goes: sets of one space, how many channels they are, and the MACs per sample left then."""

    sets: Tensor
    channels: int
    macs: float


def step_of(space: Space, round_to: int) -> int:
    """How many sets of a space are ``round_to`` channels: fewer where each has several in its layer."""
    return round_to // gcd(round_to, space.width)


def removals(scores: Tensor, spaces: Sequence[Space], costs: Costs, round_to: int, *, per_mac: bool) -> Iterator[Step]:
    """All that may go, the cheapest to lose first: by score, or by score per MAC that is saved.

    Every chunk leaves its space at a multiple of ``round_to`` channels, and at least one such multiple.
    """
    counts = [len(space.sets) for space in spaces]
    queues = [_chunks(scores, space, step_of(space, round_to)) for space in spaces]
    losses = [[float(scores[chunk].sum()) for chunk in queue] for queue in queues]
    macs, done = costs.macs(), [0] * len(spaces)

    def price(index: int) -> float:
        chunk, loss = queues[index][done[index]], losses[index][done[index]]
        return loss / (max(costs.saving(index, len(chunk), counts), 1.0) if per_mac else len(chunk))

    prices = {index: price(index) for index, queue in enumerate(queues) if queue}
    while prices:
        best = min(prices, key=lambda index: prices[index])
        chunk = queues[best][done[best]]
        macs -= costs.saving(best, len(chunk), counts)
        counts[best] -= len(chunk)
        done[best] += 1
        if done[best] == len(queues[best]):
            del prices[best]
        for index in costs.neighbours(best) & prices.keys():
            prices[index] = price(index)
        yield Step(chunk, len(chunk) * spaces[best].width, macs)


def _chunks(scores: Tensor, space: Space, step: int) -> list[Tensor]:
    """What may go of one space, in order; what cannot be ranked stays."""
    ranked = space.sets[scores[space.sets].argsort(stable=True)]
    ranked = ranked[scores[ranked].isfinite()]
    ends = range(len(space.sets) % step, min(len(ranked), len(space.sets) - step) + 1, step)
    return [ranked[max(0, end - step) : end] for end in ends if end]  # the first one makes the width a multiple


def by_amount(steps: Iterable[Step], most: float, count: int) -> Tensor:
    """Sets to drop, bool ``[count]``: steps as long as no more than ``most`` channels go."""
    dropped, gone = torch.zeros(count, dtype=torch.bool), 0
    for step in steps:
        gone += step.channels
        if gone > most:
            break
        dropped[step.sets] = True
    return dropped


def by_amount_of_each(scores: Tensor, spaces: Sequence[Space], amount: float, round_to: int, count: int) -> Tensor:
    """Sets to drop, bool ``[count]``: of every space as many chunks as ``amount`` of it holds."""
    dropped = torch.zeros(count, dtype=torch.bool)
    for space in spaces:
        left = amount * len(space.sets)
        for chunk in _chunks(scores, space, step_of(space, round_to)):
            left -= len(chunk)
            if left < 0:
                break
            dropped[chunk] = True
    return dropped


def by_threshold(scores: Tensor, spaces: Sequence[Space], threshold: float, round_to: int, count: int) -> Tensor:
    """Sets to drop, bool ``[count]``: chunks of which every set scores below ``threshold``."""
    dropped = torch.zeros(count, dtype=torch.bool)
    for space in spaces:
        for chunk in _chunks(scores, space, step_of(space, round_to)):
            if bool((scores[chunk] < threshold).all()):
                dropped[chunk] = True
    return dropped


def by_macs(steps: Iterable[Step], before: float, macs: float, count: int) -> tuple[Tensor, float]:
    """Sets to drop, bool ``[count]``: steps until no more than ``macs`` of those ``before`` are left; and what is."""
    dropped, left = torch.zeros(count, dtype=torch.bool), before
    for step in steps:
        if left <= macs:
            break
        dropped[step.sets] = True
        left = step.macs
    return dropped, left
