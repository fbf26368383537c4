"""Orders the layers of two parallel chains into one sequence of steps.

A step is linear or pointwise and advances one chain or both; a chain that does not advance is carried. The first
step is linear (it lifts the fork into a stack of two) and so is the last (it joins), whatever the chains hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["linear", "pointwise"]


@dataclass(frozen=True)
class Step:
    """One step: its kind, and which of the two chains it advances."""

    kind: Kind
    advances: tuple[bool, bool]


_MOVES = ((True, True), (True, False), (False, True))


def schedules(first: tuple[Kind, ...], second: tuple[Kind, ...]) -> Iterator[tuple[Step, ...]]:
    """Every sequence of steps for chains of these layer kinds, shortest sequences first.

    >>> [len(steps) for steps in schedules(("linear", "pointwise", "linear"), ("linear",))][:2]
    [3, 3]
    """
    longest = len(first) + len(second) + 2
    for length in range(1, longest + 1):
        yield from _extend((first, second), (0, 0), length, ())


def _extend(
    chains: tuple[tuple[Kind, ...], tuple[Kind, ...]], done: tuple[int, int], left: int, steps: tuple[Step, ...]
) -> Iterator[tuple[Step, ...]]:
    remaining = [chain[count:] for chain, count in zip(chains, done, strict=True)]
    if max(map(len, remaining)) > left:
        return
    if not any(remaining):
        yield from _join(steps, left)
        return
    for step in _next_steps(remaining, first=not steps):
        reached = (done[0] + step.advances[0], done[1] + step.advances[1])
        yield from _extend(chains, reached, left - 1, (*steps, step))


def _join(steps: tuple[Step, ...], left: int) -> Iterator[tuple[Step, ...]]:
    """Both chains are done: the last step joins if it is linear, else one more step does."""
    merge = () if steps and steps[-1].kind == "linear" else (Step("linear", (False, False)),)
    if left == len(merge):
        yield (*steps, *merge)


def _next_steps(remaining: list[tuple[Kind, ...]], first: bool) -> Iterator[Step]:
    heads: list[Kind | None] = [chain[0] if chain else None for chain in remaining]
    if first and "pointwise" in heads:
        yield Step("linear", (False, False))
    kinds: tuple[Kind, ...] = ("linear",) if first else ("linear", "pointwise")
    for kind in kinds:
        for move in _MOVES:
            if all(heads[side] == kind for side in (0, 1) if move[side]):
                yield Step(kind, move)
