"""One schedule of a region, carried out on shapes alone: which maps each step stacks, and what it carries.

At each cut the stack holds one segment per chain: its value so far, possibly *split* into two copies. Over a linear
step the stack is multiplied by a block matrix (a chain's own map where it advances, a Dirac where it is carried);
over a pointwise step the advancing segments go through their activation and the others are carried. Conditions:

1. all maps of a step share one stride, padding mode and tap grid (:func:`rmfx.algebra.grid.align`);
2. a stride subsamples every segment, so a segment may run *ahead* of its chain only into 1x1 maps that stride
   as much later;
3. the stack has at every cut the size each carried value has: at all input sizes where every excess is 0, else at
   the sizes of the example inputs only (a *size condition*);
4. every pointwise step has a carrier for what it carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import nn

from rmfx.algebra.affine import Affine, add, dirac, scaled
from rmfx.algebra.carrier import Carrier, choose_carrier
from rmfx.algebra.grid import Axis, Grid, align
from rmfx.algebra.pointwise import NORMS, Range, image, is_per_channel, split_constant
from rmfx.errors import InexactError
from rmfx.layout.grouping import LinearStep
from rmfx.layout.problem import Problem
from rmfx.layout.schedule import Step


@dataclass(frozen=True)
class _Segment:
    """One chain's part of the stack.

    Attributes:
        done: how many of the chain's layers its value has behind it.
        ahead: per axis, how much coarser the stack is than that value.
        range: holds every element of every copy.
        factors: the value is the sum of the copies, each times its factor.
    """

    done: int
    ahead: tuple[int, ...]
    range: Range
    factors: tuple[float, ...] = (1.0,)


class Draft:
    """One schedule, carried out; raises InexactError at the first broken condition.

    Attributes:
        linear_steps: the block matrices, in order.
        activations: of each pointwise step, one per segment copy (``None``: carried past it).
        kinds, names: of all steps; a step without a name advances no chain.
        carriers, masked_channels, sized: what carrying took.
        shortcut_applied: the linear step that last advanced the shortcut.
        dirac: a linear step and the key of a block that only carries, where there is one.
    """

    def __init__(self, problem: Problem, steps: Sequence[Step]) -> None:
        self.problem = problem
        self.linear_steps: list[LinearStep] = []
        self.activations: list[tuple[nn.Module | None, ...]] = []
        self.names: list[str | None] = []
        self.kinds = [step.kind for step in steps]
        self.carriers: set[Carrier] = set()
        self.sized = False
        self.masked_channels = 0
        self.shortcut_applied = 0
        self.dirac: tuple[int, tuple[int, int]] | None = None
        self._sizes = problem.fork.sizes
        self._density = 1.0
        start = _Segment(0, (1,) * problem.dims, problem.fork.range)
        self._segments = (start, start)
        self._columns = ([(0, 1.0)], [(0, 1.0)])  # where each chain's value is read: (segment of the stack, factor)
        for index, step in enumerate(steps):
            self.names.append(self._name(step))
            if step.kind == "linear":
                self._linear(step, steps[index + 1 :])
            else:
                self._pointwise(step)

    # -- linear steps -------------------------------------------------------------------------------------------------

    def _linear(self, step: Step, later: Sequence[Step]) -> None:
        stride = self._stride(step)
        maps = tuple(self._map(side, step, stride) for side in (0, 1))
        if not later and maps[0].out_channels != maps[1].out_channels:
            raise InexactError(f"the sum broadcasts {maps[0].out_channels} and {maps[1].out_channels} channels")
        first, second = (self._encoded(side, self._moved(side, step, stride), later) for side in (0, 1))
        after = (first, second)
        before_widths = tuple(self._widths(self._segments)) if self.linear_steps else (self.problem.fork.channels,)
        main = 0 if step.advances[0] or not step.advances[1] else 1
        blocks = self._blocks(maps, after, step, main, joins=not later)
        grid = align([block.grid for block in blocks.values()])[0]
        self._check_sizes(grid, [m.grid for m in maps], step, after)
        after_widths = tuple(self._widths(after)) if later else (maps[0].out_channels,)
        positions = self._density if self._sizes is None else prod(self._sizes)
        if step.advances[1]:
            self.shortcut_applied = len(self.linear_steps)
        self.linear_steps.append(LinearStep(blocks, before_widths, after_widths, positions, grid.taps))
        self._segments = after
        self._columns = _columns(after)
        if not later and any(a != 1 for segment in after for a in segment.ahead):
            raise InexactError("the strides of the two branches cannot be brought in step")

    def _stride(self, step: Step) -> tuple[int, ...]:
        """Condition 2: the largest stride that an advancing map still has to make, per axis."""
        needs = [self._own_stride(side) for side in (0, 1) if step.advances[side]]
        return tuple(max(axis) for axis in zip(*needs, strict=True)) if needs else (1,) * self.problem.dims

    def _own_stride(self, side: int) -> tuple[int, ...]:
        affine, ahead = self._next_map(side), self._segments[side].ahead
        return tuple(_stride_left(axis, a) for axis, a in zip(affine.grid.axes, ahead, strict=True))

    def _next_map(self, side: int) -> Affine:
        affine = self.problem.chains[side][self._segments[side].done].map
        assert isinstance(affine, Affine)
        return affine

    def _map(self, side: int, step: Step, stride: tuple[int, ...]) -> Affine:
        """What the step does to one chain: its next map, or a Dirac, at the step's stride."""
        if not step.advances[side]:
            return dirac(self.problem.value(side, self._segments[side].done).channels, Grid.sampling(stride))
        affine = self._next_map(side)
        if affine.grid.stride == stride:
            return affine
        axes = tuple(replace(axis, stride=s) for axis, s in zip(affine.grid.axes, stride, strict=True))
        return replace(affine, grid=replace(affine.grid, axes=axes))

    def _moved(self, side: int, step: Step, stride: tuple[int, ...]) -> _Segment:
        """A chain's segment behind the step."""
        segment = self._segments[side]
        if not step.advances[side]:
            return replace(segment, ahead=tuple(a * s for a, s in zip(segment.ahead, stride, strict=True)))
        own = self._next_map(side).grid.stride
        spans = list(zip(segment.ahead, stride, own, strict=True))
        if any(a * s % o for a, s, o in spans):
            raise InexactError("the strides of parallel branches do not divide each other")
        done = segment.done + 1
        return _Segment(done, tuple(a * s // o for a, s, o in spans), self.problem.value(side, done).range)

    def _encoded(self, side: int, segment: _Segment, later: Sequence[Step]) -> _Segment:
        """Split a segment right before the first pointwise step that it can only pass split."""
        carried_next = bool(later) and later[0].kind == "pointwise" and not later[0].advances[side]
        if not carried_next or len(segment.factors) > 1:
            return segment
        for other in (0, 1):
            if not later[0].advances[other]:
                continue
            activation = self._next_activation(other)
            if isinstance(activation, NORMS):
                continue
            if choose_carrier(activation, segment.range, self.problem.carrier) == "split":
                k = split_constant(activation)
                assert k is not None
                reach = max(abs(segment.range[0]), abs(segment.range[1]))
                return replace(segment, factors=(1.0 / k, -1.0 / k), range=(-reach, reach))
        return segment

    def _next_activation(self, side: int) -> nn.Module:
        rest = self.problem.chains[side][self._segments[side].done :]
        found = next(layer.map for layer in rest if isinstance(layer.map, nn.Module))
        assert isinstance(found, nn.Module)
        return found

    def _blocks(
        self, maps: tuple[Affine, ...], after: tuple[_Segment, ...], step: Step, main: int, joins: bool
    ) -> dict[tuple[int, int], Affine]:
        """The block matrix: decode what is split, apply each chain's map, encode; a join adds into one row.

        The blocks of chain ``main`` come first: their size is the size of the result.
        """
        blocks: dict[tuple[int, int], Affine] = {}
        for side in (main, 1 - main):
            segment = self._segments[side]
            copies = [1.0] if joins else [1.0 if factor > 0 else -1.0 for factor in after[side].factors]
            keeps_copies = not step.advances[side] and not joins and len(segment.factors) == len(copies)
            first_row = 0 if joins or side == 0 else len(after[0].factors)
            for copy, sign in enumerate(copies):
                for index, (column, factor) in enumerate(self._columns[side]):
                    if keeps_copies and index != copy:
                        continue
                    # the bias belongs to the sum of the copies, so only one block of a row has it
                    block = maps[side] if keeps_copies else scaled(maps[side], sign * factor, sign * (index == 0))
                    key = (first_row + copy, column)
                    if not step.advances[side] and self.dirac is None and key not in blocks:
                        self.dirac = (len(self.linear_steps), key)
                    blocks[key] = add(blocks[key], block) if key in blocks else block
        return blocks

    def _check_sizes(self, grid: Grid, grids: Sequence[Grid], step: Step, after: tuple[_Segment, ...]) -> None:
        """Condition 3."""
        for s in grid.stride:
            self._density /= s
        exact = all(other.excess == grid.excess for other in grids)
        if self._sizes is None:
            if not exact:
                raise InexactError(
                    "a layer changes the size in a way that not every branch follows at all input sizes: "
                    "pass example_inputs"
                )
            return
        self._sizes = grid.out_size(self._sizes)
        for side, segment in enumerate(after):
            sizes = self.problem.value(side, segment.done).sizes
            wanted = sizes and tuple((n - 1) // a + 1 for n, a in zip(sizes, segment.ahead, strict=True))
            if wanted != self._sizes:
                raise InexactError(f"a stack of size {self._sizes} cannot hold a tensor of size {wanted}")
        self.sized |= not exact

    # -- pointwise steps ----------------------------------------------------------------------------------------------

    def _pointwise(self, step: Step) -> None:
        """Condition 4: a carrier for every segment that does not advance."""
        acting = {side: self._next_activation(side) for side in (0, 1) if step.advances[side]}
        parts: list[nn.Module | None] = []
        after = []
        for side, segment in enumerate(self._segments):
            if side not in acting:
                part, passed = self._carried(side, segment, list(acting.values()))
                parts += [part] * len(segment.factors)
                after.append(passed)
                continue
            done = segment.done + 1
            parts.append(acting[side])
            after.append(replace(segment, done=done, range=self.problem.value(side, done).range))
        self.activations.append(tuple(parts))
        self._segments = (after[0], after[1])

    def _carried(self, side: int, segment: _Segment, acting: list[nn.Module]) -> tuple[nn.Module | None, _Segment]:
        """The activation that a carried segment goes through (None: it is masked), and the segment behind it."""
        if all(isinstance(activation, NORMS) for activation in acting):
            return None, segment  # a widened norm is the identity on what it carries
        if len(segment.factors) > 1 and segment.range[0] < 0 and all(split_constant(a) is not None for a in acting):
            self.carriers.add("split")
            return acting[0], replace(segment, range=image(acting[0], segment.range))
        wanted = self.problem.carrier if len(segment.factors) == 1 else "auto"
        if {choose_carrier(activation, segment.range, wanted) for activation in acting} == {"direct"}:
            self.carriers.add("direct")
            return None if is_per_channel(acting[0]) else acting[0], segment
        self.carriers.add("masked")
        self.masked_channels += self.problem.value(side, segment.done).channels * len(segment.factors)
        return None, segment

    # -- shared -------------------------------------------------------------------------------------------------------

    def _widths(self, segments: Sequence[_Segment]) -> list[int]:
        """Channels of every copy of every segment."""
        return [
            self.problem.value(side, segment.done).channels
            for side, segment in enumerate(segments)
            for _ in segment.factors
        ]

    def _name(self, step: Step) -> str | None:
        advancing = [side for side in (0, 1) if step.advances[side]]
        return self.problem.chains[advancing[0]][self._segments[advancing[0]].done].name if advancing else None


def _stride_left(axis: Axis, ahead: int) -> int:
    """Condition 2: the stride that a map must still make where its input is ``ahead`` times too coarse already."""
    if ahead == 1:
        return axis.stride
    if not axis.samples:
        raise InexactError("a stride would discard positions that a later convolution of the shortcut reads")
    return max(axis.stride // ahead, 1)


def _columns(segments: Sequence[_Segment]) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    first = list(enumerate(segments[0].factors))
    second = list(enumerate(segments[1].factors, start=len(first)))
    return first, second
