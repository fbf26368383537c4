"""Fewer ops for the same region: what costs nothing to compose is composed, what nothing needs is dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rmfx.algebra.affine import Affine, compose, scaled
from rmfx.errors import InexactError
from rmfx.layout.problem import Gate, Op, Problem


def absorb_diagonals(problem: Problem) -> Problem:
    """Compose what only scales or pads channels into the map before or behind it: never costs a MAC."""
    return _composed(problem, lambda outer, inner, _: _is_free(outer, inner))


def compose_paths(problem: Problem, values: set[int]) -> Problem:
    """Compose consecutive linear ops wherever that is exact, among those that make one of ``values``."""
    return _composed(problem, lambda outer, inner, pair: _is_free(outer, inner) or set(pair) <= values)


def _is_free(outer: Affine, inner: Affine) -> bool:
    """Whether the composition of two maps costs what one of them costs: the other scales, pads before it or crops."""
    return outer.diagonal or _shifts(inner) or _crops(outer)


def _shifts(affine: Affine) -> bool:
    """Whether every channel is only scaled and padded, or cropped."""
    return affine.groups == affine.in_channels == affine.out_channels and affine.grid.taps == 1 and affine.unstrided


def _crops(affine: Affine) -> bool:
    return _shifts(affine) and all(axis.before <= 0 and axis.after <= 0 for axis in affine.grid.axes)


def _composed(problem: Problem, wanted: Callable[[Affine, Affine, tuple[int, int]], bool]) -> Problem:
    """Merge each linear op into the only op that reads it, where that one is linear and the composition exact."""
    ops = dict(problem.numbered())
    for number in list(ops):
        while (merged := _merged(problem, ops, number, wanted)) is not None:
            ops[number] = merged
    return _without_dead(problem, ops)


def _merged(
    problem: Problem, ops: dict[int, Op], number: int, wanted: Callable[[Affine, Affine, tuple[int, int]], bool]
) -> Op | None:
    """Op ``number`` with one of its inputs composed into it, or ``None`` where none can be."""
    op = ops[number]
    if op.kind != "linear":
        return None
    for index, (source, outer) in enumerate(zip(op.inputs, op.maps, strict=True)):
        inner = ops.get(source)
        if inner is None or inner.kind != "linear" or len(inner.inputs) != 1 and not outer.diagonal:
            continue
        if source in problem.join or _readers(ops, source) != 1:
            continue
        if not all(wanted(outer, affine, (number, source)) for affine in inner.maps):
            continue
        try:
            maps = tuple(
                compose(outer if i == 0 else scaled(outer, 1.0, 0.0), affine) for i, affine in enumerate(inner.maps)
            )
        except InexactError:  # a shift before zero padding: it stays an op of its own
            continue
        first = inner if outer.diagonal or _crops(outer) else op
        return replace(
            op,
            name=first.name,
            inputs=op.inputs[:index] + inner.inputs + op.inputs[index + 1 :],
            maps=op.maps[:index] + maps + op.maps[index + 1 :],
        )
    return None


def _readers(ops: dict[int, Op], value: int) -> int:
    return sum(op.reads.count(value) for op in ops.values())


def _without_dead(problem: Problem, ops: dict[int, Op]) -> Problem:
    """Drop ops that the join does not need, and renumber."""
    needed = set(problem.join)
    for number in reversed(list(ops)):
        if number in needed:
            needed |= set(ops[number].reads)
    kept = [number for number in ops if number in needed]
    start = len(problem.fork)
    names = {value: value for value in range(start)} | {number: start + i for i, number in enumerate(kept)}
    return replace(
        problem,
        ops=tuple(_renumbered(ops[number], names) for number in kept),
        join=tuple(names[value] for value in problem.join),
    )


def _renumbered(op: Op, names: dict[int, int]) -> Op:
    gate = op.gate
    if gate is not None:
        reads = tuple(tuple(names[value] for value in read) for read in gate.reads)
        gate = Gate(gate.key, reads, gate.channels, gate.start)
    return replace(op, inputs=tuple(names[value] for value in op.inputs), gate=gate)
