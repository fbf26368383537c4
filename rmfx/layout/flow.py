"""Who reads what inside a region: the part of planning that is the same for every schedule."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set

from rmfx.layout.problem import Op, Problem
from rmfx.layout.schedule import StepKind, Task


class Flow:
    """The readers of every value, and what there is to schedule.

    Attributes:
        units: the values that each task makes.
        tasks: of the schedule (:mod:`rmfx.layout.schedule`); sums are none.
        shortcuts: values on linear paths from fork to join, behind a layer of the user's.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.readers: dict[int, list[tuple[int, Op]]] = {}
        self._unit_inputs: dict[int, set[int]] = {}
        by_unit: dict[int, list[int]] = {}
        for number, op in problem.numbered():
            for value in dict.fromkeys(op.reads):
                self.readers.setdefault(value, []).append((number, op))
            self._unit_inputs.setdefault(op.unit, set()).update(op.inputs)
            if op.kind != "sum":
                by_unit.setdefault(op.unit, []).append(number)
        self.units: Sequence[Sequence[int]] = list(by_unit.values())
        self._task_of = {number: index for index, unit in enumerate(self.units) for number in unit}
        self.tasks = [self._task(index, unit) for index, unit in enumerate(self.units)]
        self.shortcuts = shortcut_values(problem)

    def _task(self, index: int, unit: Sequence[int]) -> Task:
        needs: set[int] = set()
        settled: set[int] = set()
        kind: StepKind = "linear"
        for number in unit:
            op = self.problem.op(number)
            assert op is not None and op.kind != "sum"
            kind = op.kind
            needs |= {self._task_of[leaf] for value in op.reads for leaf in self._leaves(value)}
            for value in op.inputs if kind != "linear" else ():
                if self._needs_a_copy(value, index):
                    settled |= {self._task_of[leaf] for leaf in self._leaves(value)}
        return Task(kind, frozenset(needs - {index}), frozenset(settled))

    def _needs_a_copy(self, value: int, task: int) -> bool:
        """Whether a nonlinear task can only act on what a linear step has summed up or copied for it."""
        source = self.problem.op(value)
        if source is None or source.kind == "sum" or value in self.problem.join:
            return True
        return any(self._task_of.get(number) != task for number, _ in self.readers[value])

    def _leaves(self, value: int) -> set[int]:
        """The ops that a value is made of, through sums."""
        op = self.problem.op(value)
        if op is None:
            return set()
        if op.kind != "sum":
            return {value}
        return {leaf for term in op.inputs for leaf in self._leaves(term)}

    def summed(self, done: Set[int]) -> set[int]:
        """The sums that ``done`` has all terms of."""
        found: set[int] = set()
        for number, op in self.problem.numbered():
            if op.kind == "sum" and all(value in done or value in found for value in op.inputs):
                found.add(number)
        return found

    def alive(self, done: Set[int], soon: Sequence[int]) -> list[int]:
        """The values of ``done`` that are still needed: what the ops ``soon`` act on first, the fork last."""
        first = {value for number in soon for value in self._op(number).inputs}
        needed = [v for v in sorted(done) if v in self.problem.join or self.readers_left(v, done)]
        return sorted(needed, key=lambda value: (value not in first, value < len(self.problem.fork), value))

    def readers_left(self, value: int, done: Collection[int]) -> list[tuple[int, Op]]:
        """The readers of a value that are not done."""
        return [(number, op) for number, op in self.readers.get(value, ()) if number not in done]

    def read_beside(self, value: int, acting: Collection[int], done: Collection[int]) -> bool:
        """Whether a value is needed beside the ops of ``acting`` that act on copies of it."""
        if value in self.problem.join:
            return True
        for number, op in self.readers_left(value, done):
            # what a gate is computed from is read where it stands, unless the gate multiplies it anyway
            if number not in acting or value not in self._unit_inputs[op.unit]:
                return True
        return False

    def next_owner(self, made: int, done: Collection[int]) -> int | None:
        """The op that acts on a value made in a nonlinear step, where it is all that reads it."""
        acting = [(number, op) for number, op in self.readers.get(made, ()) if made in op.inputs]
        if len(acting) != 1 or acting[0][1].kind in ("linear", "sum"):
            return None
        number, op = acting[0]
        together = [n for n, other in self.readers[made] if other.unit == op.unit]
        return None if self.read_beside(made, together, done) else number

    def _op(self, number: int) -> Op:
        op = self.problem.op(number)
        assert op is not None
        return op


def shortcut_values(problem: Problem) -> set[int]:
    """Values on linear paths from fork to join, behind a layer of the user's."""
    linear = set(range(len(problem.fork)))
    for number, op in problem.numbered():
        if op.kind in ("linear", "sum") and set(op.inputs) <= linear:
            linear.add(number)
    wanted = set(problem.join)
    for number, op in reversed(problem.numbered()):
        if number in wanted and op.kind in ("linear", "sum"):
            wanted |= set(op.inputs)
    return {number for number, op in problem.numbered() if op.kind == "linear" and number in linear & wanted}
