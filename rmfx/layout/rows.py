"""One linear step of a stack: every value behind it as a sum of maps of the values before it.

A value whose op advances is that op's maps of its inputs, a sum is the sum of its terms, anything else is carried by a
Dirac. The step has one stride; a value may run *ahead*: be held at fewer positions than it has, because a stride that
a parallel branch makes now is one that its own layers only make later.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from rmfx.algebra.affine import Affine, compose, dirac, scaled, uniform
from rmfx.algebra.grid import Axis, Grid
from rmfx.errors import InexactError
from rmfx.layout.problem import Problem
from rmfx.layout.segments import Segment, columns_of, holds, leaves

Ahead = tuple[int, ...]  # per axis, how much coarser the stack is than the value


@dataclass(frozen=True, eq=False)
class Row:
    """A value behind the step.

    Attributes:
        terms: (value before, map, whether the map's bias counts) to add up.
        ahead: of the value.
        carries: whether it is the value itself, carried.
        advances: whether any layer of the user's makes it.
    """

    terms: tuple[tuple[int, Affine, bool], ...]
    ahead: Ahead
    carries: bool = False
    advances: bool = False


@dataclass(frozen=True, eq=False)
class LinearMove:
    """A linear step: the stack before it, how far its values are ahead, what advances, and the stride."""

    problem: Problem
    stack: Sequence[Segment]
    ahead: dict[int, Ahead]
    advancing: Collection[int]

    @property
    def stride(self) -> tuple[int, ...]:
        """The largest stride that an advancing map still has to make, per axis.

        Raises:
            InexactError: when the stack has lost positions that a map reads.
        """
        needs = []
        for number in self.advancing:
            op = self.problem.op(number)
            assert op is not None
            for value, affine in zip(op.inputs, op.maps, strict=True):
                for leaf in leaves(self.problem, value, self.stack):
                    pairs = zip(affine.grid.axes, self.ahead[leaf], strict=True)
                    needs.append(tuple(_stride_left(axis, ahead) for axis, ahead in pairs))
        return tuple(max(axis) for axis in zip(*needs, strict=True)) if needs else (1,) * self.problem.dims

    def row(self, value: int, stride: tuple[int, ...]) -> Row:
        """How a value behind the step is made.

        Raises:
            InexactError: when strides do not divide each other, or the value can no longer be made.
        """
        if holds(self.stack, value):
            channels = self.problem.value(value).channels
            moved = tuple(a * s for a, s in zip(self.ahead[value], stride, strict=True))
            return Row(((value, dirac(channels, Grid.sampling(stride)), True),), moved, carries=True)
        op = self.problem.op(value)
        if op is not None and op.kind == "sum":
            rows = [self.row(term, stride) for term in op.inputs]
            rows.sort(key=lambda row: not row.advances)  # the first term has the size of the result
            terms = tuple(term for row in rows for term in row.terms)
            return Row(terms, _agreed([row.ahead for row in rows]), advances=any(row.advances for row in rows))
        if op is None or value not in self.advancing:
            raise InexactError("a value is needed again that the stack no longer holds")
        terms = ()
        reached = []
        for source, affine in zip(op.inputs, op.maps, strict=True):
            moved_map = _with_stride(affine, stride)
            for index, leaf in enumerate(leaves(self.problem, source, self.stack)):
                terms += ((leaf, moved_map, index == 0),)
                reached.append(_left_ahead(self.ahead[leaf], stride, affine.grid.stride))
        return Row(terms, _agreed(reached), advances=True)

    def blocks(self, row: Row, segment: Segment) -> list[tuple[int, Affine]]:
        """What one segment reads: decode each term, apply its map, encode. Pairs of (segment before, map)."""
        dims = self.problem.dims
        held = [(i, s) for i, s in enumerate(self.stack) if s.value == segment.value and s.owner is None]
        if row.carries and held and held[0][1].encoding == segment.encoding and segment.encoding.stable:
            return [(index, row.terms[0][1]) for index, other in held if other.part == segment.part]
        gain, offset = segment.encoding.copies[segment.part]
        found = []
        for leaf, affine, biased in row.terms:
            for part, (column, factor, shift) in enumerate(columns_of(leaf, self.stack)):
                bias = gain if biased and part == 0 else 0.0  # of the sum of all parts, so only one of them has it
                if shift:
                    decoded = uniform(affine.in_channels, dims, factor, shift)
                    block = compose(scaled(affine, gain, bias), decoded)
                else:
                    block = scaled(affine, gain * factor, bias)
                found.append((column, block))
        if offset:
            column, block = found[0]
            found[0] = (column, compose(uniform(block.out_channels, dims, 1.0, offset), block))
        return found


def _with_stride(affine: Affine, stride: tuple[int, ...]) -> Affine:
    if affine.grid.stride == stride:
        return affine
    axes = tuple(replace(axis, stride=s) for axis, s in zip(affine.grid.axes, stride, strict=True))
    return replace(affine, grid=replace(affine.grid, axes=axes))


def _stride_left(axis: Axis, ahead: int) -> int:
    """The stride that a map must still make where its input is ``ahead`` times too coarse already."""
    if ahead == 1:
        return axis.stride
    if not axis.samples:
        raise InexactError("a stride would discard positions that a later convolution of the shortcut reads")
    return max(axis.stride // ahead, 1)


def _left_ahead(ahead: Ahead, stride: tuple[int, ...], own: tuple[int, ...]) -> Ahead:
    spans = list(zip(ahead, stride, own, strict=True))
    if any(a * s % o for a, s, o in spans):
        raise InexactError("the strides of parallel branches do not divide each other")
    return tuple(a * s // o for a, s, o in spans)


def _agreed(reached: Sequence[Ahead]) -> Ahead:
    if len(set(reached)) != 1:
        raise InexactError("the strides of the two branches cannot be brought in step")
    return reached[0]
