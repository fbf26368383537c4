"""What a stack is made of: copies of values side by side, and what a nonlinear step does to each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from rmfx.errors import InexactError
from rmfx.layout.carrying import PLAIN, Encoding
from rmfx.layout.problem import Gate, Problem

Column = tuple[int, float, float]  # a segment, with a factor and a constant


@dataclass(frozen=True)
class Segment:
    """One copy of a value in the stack.

    Attributes:
        value: its number.
        encoding: how the copy holds it.
        part: which of the encoding's segments this is.
        owner: the op that will act on this copy, where one will before the next linear step.
    """

    value: int
    encoding: Encoding = PLAIN
    part: int = 0
    owner: int | None = None


@dataclass(frozen=True, eq=False)
class Nonlinear:
    """What a nonlinear step does to each segment: an activation, nothing, a gate, or one stage for all.

    Attributes:
        step: index of the linear step before it.
        parts: the activation of each segment, ``None`` where it passes.
        stage: the layer that all segments go through.
        gate: what multiplies the segments ``gated`` (segment, first channel of the factor).
        reads: for each tensor the gate reads, the columns of each of its values.
    """

    step: int
    parts: tuple[nn.Module | None, ...] = ()
    stage: nn.Module | None = None
    gate: Gate | None = None
    gated: tuple[tuple[int, int], ...] = ()
    reads: tuple[tuple[tuple[Column, ...], ...], ...] = ()


def holds(stack: Sequence[Segment], value: int) -> bool:
    """Whether a stack has a segment of the value."""
    return any(segment.value == value for segment in stack)


def columns_of(value: int, stack: Sequence[Segment]) -> list[Column]:
    """The segments that add up to a value of the stack."""
    held = [(index, segment) for index, segment in enumerate(stack) if segment.value == value]
    plain = [index for index, segment in held if segment.owner is not None or segment.encoding == PLAIN]
    if plain:
        return [(plain[0], 1.0, 0.0)]
    return [(index, *d) for index, s in held if (d := s.encoding.decoding[s.part])[0]]


def leaves(problem: Problem, value: int, stack: Sequence[Segment]) -> list[int]:
    """The values in the stack that ``value`` is the sum of.

    Raises:
        InexactError: when there is one that the stack does not hold.
    """
    if holds(stack, value):
        return [value]
    op = problem.op(value)
    if op is None or op.kind != "sum":
        raise InexactError("a value is needed again that the stack no longer holds")
    return [leaf for term in op.inputs for leaf in leaves(problem, term, stack)]
