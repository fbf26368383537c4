"""Orders the operations of a region into one sequence of steps.

A step is linear, pointwise, a gate or a stage, and advances some operations of its kind; what does not advance is
carried. The first step is linear (it lifts the fork into a stack) and so is the last (it joins). Sums are no steps of
their own: a linear step computes those that it can. Whatever must be copied or summed before a nonlinear step can act
on it takes a linear step in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

StepKind = Literal["linear", "pointwise", "gate", "stage"]
NONLINEAR: tuple[StepKind, ...] = ("pointwise", "stage")
MOST_STATES = 20_000  # bounds the search: beyond it, no further schedule is looked for
_FEW = 4  # of up to this many ready tasks every choice is tried


@dataclass(frozen=True)
class Task:
    """One operation to schedule.

    Attributes:
        kind: of the step it belongs to.
        needs: tasks that must be done before.
        settled: those among them whose value a linear step must have copied or summed up since.
    """

    kind: StepKind
    needs: frozenset[int] = frozenset()
    settled: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Step:
    """One step: its kind, and the tasks it advances (none where it only lifts, copies, sums or joins)."""

    kind: StepKind
    tasks: tuple[int, ...]


def schedules(tasks: Sequence[Task]) -> Iterator[tuple[Step, ...]]:
    """Every sequence of steps that does all ``tasks``, shortest sequences first (some of them, where there are many).

    >>> conv, relu, last = Task("linear"), Task("pointwise", frozenset({0})), Task("linear", frozenset({1}))
    >>> [[step.tasks for step in steps] for steps in schedules([conv, relu, last])]
    [[(0,), (1,), (2,)]]
    """
    search = _Search(tasks)
    for length in range(1, 2 * len(tasks) + 3):
        yield from search.extend(frozenset(), frozenset(), (), length)
        if search.states > MOST_STATES:
            return


class _Search:
    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.states = 0
        self.height = [0] * len(tasks)  # steps that are at least left, from a task to the join
        readers: list[list[int]] = [[] for _ in tasks]
        for index, task in enumerate(tasks):
            for need in task.needs:
                readers[need].append(index)
        for index in reversed(range(len(tasks))):
            last = 1 if tasks[index].kind == "linear" else 2
            self.height[index] = max((self.height[r] + 1 for r in readers[index]), default=last)

    def extend(
        self, done: frozenset[int], fresh: frozenset[int], steps: tuple[Step, ...], left: int
    ) -> Iterator[tuple[Step, ...]]:
        """Complete ``steps`` with exactly ``left`` more; ``fresh`` are the tasks done since the last linear step."""
        self.states += 1
        remaining = [index for index in range(len(self.tasks)) if index not in done]
        if self.states > MOST_STATES or max((self.height[i] for i in remaining), default=0) > left:
            return
        if not remaining:
            joins = () if steps and steps[-1].kind == "linear" else (Step("linear", ()),)
            if left == len(joins):
                yield (*steps, *joins)
            return
        for step in self._moves(remaining, done, fresh, steps):
            now = frozenset(step.tasks)
            yield from self.extend(
                done | now, frozenset() if step.kind == "linear" else fresh | now, (*steps, step), left - 1
            )

    def _moves(
        self, remaining: list[int], done: frozenset[int], fresh: frozenset[int], steps: tuple[Step, ...]
    ) -> Iterator[Step]:
        ready = [index for index in remaining if self.tasks[index].needs <= done]
        linear = [index for index in ready if self.tasks[index].kind == "linear"]
        others = [index for index in ready if self.tasks[index].kind != "linear"]
        idle = bool(others) if not steps else any(self.tasks[i].settled & fresh for i in others)
        if idle and (not steps or steps[-1].kind != "linear"):
            yield Step("linear", ())
        yield from (Step("linear", chosen) for chosen in self._choices(linear))
        if not steps:
            return
        free = [index for index in others if not self.tasks[index].settled & fresh]
        for kind in NONLINEAR:
            same = [index for index in free if self.tasks[index].kind == kind]
            yield from (Step(kind, chosen) for chosen in self._choices(same))
        yield from (Step("gate", (index,)) for index in free if self.tasks[index].kind == "gate")

    def _choices(self, ready: list[int]) -> Iterator[tuple[int, ...]]:
        """Which of the ready tasks advance: many before few, and where there are many, all or the most urgent."""
        if len(ready) <= _FEW:
            for size in range(len(ready), 0, -1):
                yield from combinations(ready, size)
            return
        yield tuple(ready)
        highest = max(self.height[index] for index in ready)
        urgent = tuple(index for index in ready if self.height[index] == highest)
        if len(urgent) < len(ready):
            yield urgent
