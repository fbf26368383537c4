"""Fewer ops for the same region: what costs nothing to compose is composed, what nothing needs is dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rmfx.algebra.affine import Affine, compose, scaled
from rmfx.errors import InexactError
from rmfx.layout.problem import Op, Problem


def absorb_diagonals(problem: Problem) -> Problem:
    """Compose what only scales or pads channels into the map before or behind it: never costs a MAC."""
    return _composed(_read_unpadded(problem), lambda outer, inner, _: _is_free(outer, inner))


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
    """Merge each linear op into the op that reads it, where that one is linear and the composition exact."""
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
        if source in problem.join or not _may_go(ops, source, inner):
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


def _may_go(ops: dict[int, Op], value: int, maker: Op) -> bool:
    """Whether one op reads a value, or only linear ones a value that costs none of them anything to make itself."""
    readers = [op for op in ops.values() for read in op.reads if read == value]
    return len(readers) == 1 or (all(map(_shifts, maker.maps)) and all(op.kind == "linear" for op in readers))


def _read_unpadded(problem: Problem) -> Problem:
    """Let a gate read what a layer pads or scales, and keep that layer, where all else that reads it can do without."""
    ops = dict(problem.numbered())
    for number, op in ops.items():
        for index, read in enumerate(op.gate.reads if op.gate is not None else ()):
            maker = ops.get(read[0]) if len(read) == 1 else None
            if maker is not None and read[0] not in problem.join and _is_beside(ops, read[0], maker):
                assert op.gate is not None
                gate = ops[number].gate or op.gate
                reads = (*gate.reads[:index], maker.inputs, *gate.reads[index + 1 :])
                ops[number] = replace(op, gate=replace(gate, reads=reads, behind=gate.behind | {index}))
    return _without_dead(problem, ops)


def _is_beside(ops: dict[int, Op], value: int, maker: Op) -> bool:
    """Whether ``maker`` pads or scales one value for linear ops, and for one gate that is computed from it."""
    if maker.kind != "linear" or len(maker.inputs) != 1 or not _shifts(maker.maps[0]):
        return False
    gates = {op.gate.key for op in ops.values() if op.gate is not None and value in op.reads}
    return len(gates) == 1 and all(op.kind == "linear" for op in ops.values() if value in op.inputs)


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
        gate = replace(gate, reads=tuple(tuple(names[value] for value in read) for read in gate.reads))
    return replace(op, inputs=tuple(names[value] for value in op.inputs), gate=gate)
