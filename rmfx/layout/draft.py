"""One schedule of a region, carried out on shapes alone: which maps each step stacks, and what it carries.

At each cut the stack holds *segments* (:mod:`rmfx.layout.segments`): copies of values, each as it is or encoded by its
carrier. A linear step multiplies the stack by a block matrix (:mod:`rmfx.layout.rows`) and makes the copies that the
nonlinear steps behind it act on. Conditions:

1. all maps of a step share one stride, padding mode and tap grid (:func:`rmfx.algebra.grid.align`);
2. a stride subsamples every segment, so a value may run *ahead* of itself only into maps that sample and stride as
   much later, and into no gate or stage;
3. the stack has at every cut the size each value has: at all input sizes where every excess is 0, else at
   the sizes of the example inputs only (a *size condition*);
4. every pointwise step has a carrier for what it carries; a gate leaves that alone; a stage (a pool) has no carrier:
   every segment goes through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from torch import nn

from rmfx.algebra.affine import Affine, add
from rmfx.algebra.carrier import Carrier
from rmfx.algebra.grid import Grid, align
from rmfx.algebra.pointwise import same_function
from rmfx.errors import InexactError
from rmfx.layout.carrying import PLAIN, carried_through, encoding_for
from rmfx.layout.flow import Flow
from rmfx.layout.grouping import LinearStep
from rmfx.layout.problem import Op, Wish
from rmfx.layout.rows import LinearMove, Row
from rmfx.layout.schedule import Step
from rmfx.layout.segments import Column, Nonlinear, Segment, columns_of, leaves


class Draft:
    """One schedule, carried out; raises InexactError at the first broken condition.

    Args:
        flow: of the problem.
        steps: the schedule.
        wish: how values pass activations that are not the identity on them.

    Attributes:
        linear_steps: the block matrices, in order.
        nonlinear: what stands between them, in order.
        kinds, names: of all steps; a step without a name advances nothing.
        carriers, masked_channels, sized: what carrying took.
        shortcut_applied: the linear step that last advanced a linear path from fork to join.
        dirac: a linear step and the key of a block that only carries, where there is one.
    """

    def __init__(self, flow: Flow, steps: Sequence[Step], wish: Wish) -> None:
        self.flow = flow
        self.problem = flow.problem
        self.wish = wish
        self.linear_steps: list[LinearStep] = []
        self.nonlinear: list[Nonlinear] = []
        self.kinds = [step.kind for step in steps]
        self.carriers: set[Carrier] = set()
        self.sized = False
        self.masked_channels = 0
        self.shortcut_applied = 0
        self.dirac: tuple[int, tuple[int, int]] | None = None
        self._density = 1.0
        self._sizes = self.problem.fork[0].sizes
        fork = range(len(self.problem.fork))
        self._ahead = dict.fromkeys(fork, (1,) * self.problem.dims)
        self._stack = tuple(Segment(value) for value in fork)
        self._done = set(fork)
        advances = [[value for task in step.tasks for value in flow.units[task]] for step in steps]
        self.names = [self._op(numbers[0]).name if numbers else None for numbers in advances]
        carry_out = {"pointwise": self._pointwise, "gate": self._gate, "stage": self._stage}
        for index, kind in enumerate(self.kinds):
            if kind == "linear":
                end = next((i for i in range(index + 1, len(steps)) if self.kinds[i] == "linear"), len(steps))
                self._linear(advances[index], advances[index + 1 : end], last=index + 1 == len(steps))
            else:
                carry_out[kind](advances[index])
                self._done |= set(advances[index])

    def _op(self, number: int) -> Op:
        op = self.problem.op(number)
        assert op is not None
        return op

    def _widths(self) -> tuple[int, ...]:
        """Channels of every segment."""
        return tuple(self.problem.value(segment.value).channels for segment in self._stack)

    # -- linear steps -------------------------------------------------------------------------------------------------

    def _linear(self, advancing: Sequence[int], behind: Sequence[Sequence[int]], last: bool) -> None:
        """``behind``: what each of the nonlinear steps up to the next linear one advances."""
        move = LinearMove(self.problem, self._stack, dict(self._ahead), frozenset(advancing))
        before, stride = self._widths(), move.stride
        self._done |= set(advancing)
        self._done |= self.flow.summed(self._done)
        live = list(self.problem.join) if last else self.flow.alive(self._done, behind[0] if behind else ())
        rows = {value: move.row(value, stride) for value in live}
        self._ahead |= {value: row.ahead for value, row in rows.items()}
        self._stack = tuple(Segment(value) for value in live) if last else self._copies(live, behind)
        blocks, grids = self._blocks(move, rows)
        grid = align([block.grid for block in blocks.values()])[0]
        self._resize(grid, grids)
        if self.flow.shortcuts & set(advancing):
            self.shortcut_applied = len(self.linear_steps)
        positions = self._density if self._sizes is None else prod(self._sizes)
        self.linear_steps.append(LinearStep(blocks, before, self._widths(), positions, grid.taps))
        if last and any(a != 1 for segment in self._stack for a in self._ahead[segment.value]):
            raise InexactError("the strides of the two branches cannot be brought in step")

    def _blocks(self, move: LinearMove, rows: dict[int, Row]) -> tuple[dict[tuple[int, int], Affine], list[Grid]]:
        """The block matrix, layers first, since the first block has the size of the result; the grids of all terms."""
        blocks: dict[tuple[int, int], Affine] = {}
        grids: list[Grid] = []
        for index, segment in sorted(enumerate(self._stack), key=lambda pair: not rows[pair[1].value].advances):
            row = rows[segment.value]
            for column, block in move.blocks(row, segment):
                key = (index, column)
                if row.carries and self.dirac is None:
                    self.dirac = (len(self.linear_steps), key)
                blocks[key] = add(blocks[key], block) if key in blocks else block
                grids.append(block.grid)
        return blocks, grids

    def _copies(self, live: Sequence[int], behind: Sequence[Sequence[int]]) -> tuple[Segment, ...]:
        """The stack behind a linear step: a copy of each value for every op that acts on it, one for later readers."""
        acting = [number for step in behind for number in step]
        acted = [Segment(v, owner=number) for v in live for number in acting if v in self._op(number).inputs]
        kept = [s for v in live if self.flow.read_beside(v, acting, self._done) for s in self._encoded(v, behind)]
        first = behind[0] if behind else ()
        return (*sorted(acted, key=lambda segment: segment.owner not in first), *kept)

    def _encoded(self, value: int, behind: Sequence[Sequence[int]]) -> list[Segment]:
        """The segments that carry a value past the nonlinear steps ``behind``."""
        encoding = next((s.encoding for s in self._stack if s.value == value and s.owner is None), PLAIN)
        if encoding.carrier is None or not encoding.stable:
            acting = [layer for step in behind for number in step if (layer := self._op(number).layer) is not None]
            encoding = encoding_for(acting, self.problem.value(value), self.wish)
        return [Segment(value, encoding, part) for part in range(len(encoding.copies))]

    def _resize(self, grid: Grid, grids: Sequence[Grid]) -> None:
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
        self._check_fit()
        self.sized |= not exact

    def _check_fit(self) -> None:
        for segment in self._stack:
            sizes, ahead = self.problem.value(segment.value).sizes, self._ahead[segment.value]
            wanted = sizes and tuple((n - 1) // a + 1 for n, a in zip(sizes, ahead, strict=True))
            if wanted is not None and wanted != self._sizes:
                raise InexactError(f"a stack of size {self._sizes} cannot hold a tensor of size {wanted}")

    # -- nonlinear steps ----------------------------------------------------------------------------------------------

    def _own(self, advancing: Sequence[int]) -> dict[int, int]:
        """The segments that ops act on, with the op of each."""
        found: dict[int, int] = {}
        for number in advancing:
            (value,) = self._op(number).inputs
            mine = [i for i, s in enumerate(self._stack) if s.value == value and s.owner == number]
            if not mine:
                raise InexactError("a tensor is read by a layer that has no copy of its own of it")
            found[mine[0]] = number
        return found

    def _made(self, index: int, number: int) -> Segment:
        """The segment that op ``number`` makes of segment ``index``."""
        self._ahead[number] = self._ahead[self._stack[index].value]
        return Segment(number, owner=self.flow.next_owner(number, self._done))

    def _pointwise(self, advancing: Sequence[int]) -> None:
        """Condition 4: a carrier for every segment that does not advance."""
        own = self._own(advancing)
        acting = [layer for number in advancing if (layer := self._op(number).layer) is not None]
        parts: list[nn.Module | None] = []
        after: list[Segment] = []
        for index, segment in enumerate(self._stack):
            if index in own:
                parts.append(self._op(own[index]).layer)
                after.append(self._made(index, own[index]))
                continue
            value = self.problem.value(segment.value)
            passage = carried_through(acting, segment.encoding, value.range, self.wish.carrier)
            parts.append(passage.layer)
            after.append(replace(segment, encoding=passage.after))
            self.carriers |= {passage.carrier} if passage.carrier else set()
            self.masked_channels += value.channels if passage.carrier == "masked" else 0
        self.nonlinear.append(Nonlinear(len(self.linear_steps) - 1, tuple(parts)))
        self._stack = tuple(after)

    def _gate(self, advancing: Sequence[int]) -> None:
        own = self._own(advancing)
        gate = self._op(advancing[0]).gate
        assert gate is not None
        touched = [*(value for read in gate.reads for value in read), *(self._stack[index].value for index in own)]
        if any(
            a != 1 for value in touched for leaf in leaves(self.problem, value, self._stack) for a in self._ahead[leaf]
        ):
            raise InexactError("a gate would read positions that a stride of the other branch has discarded")
        reads = tuple(tuple(self._columns(value) for value in read) for read in gate.reads)
        gated = []
        for index, number in own.items():
            part = self._op(number).gate
            assert part is not None
            gated.append((index, part.start))
        self.nonlinear.append(Nonlinear(len(self.linear_steps) - 1, gate=gate, gated=tuple(gated), reads=reads))
        if len(own) < len(self._stack):
            self.carriers.add("direct")
        self._stack = tuple(self._made(i, own[i]) if i in own else s for i, s in enumerate(self._stack))

    def _columns(self, value: int) -> tuple[Column, ...]:
        return tuple(c for leaf in leaves(self.problem, value, self._stack) for c in columns_of(leaf, self._stack))

    def _stage(self, advancing: Sequence[int]) -> None:
        own = self._own(advancing)
        layers = [layer for number in advancing if (layer := self._op(number).layer) is not None]
        if len(own) < len(self._stack):
            name = f"{self._op(advancing[0]).name}, a {type(layers[0]).__name__},"
            raise InexactError(f"{name} stands in one branch only: what is carried beside it would be changed by it")
        if not all(same_function(layers[0], layer) for layer in layers):
            names = " and ".join(dict.fromkeys(self._op(number).name for number in advancing))
            raise InexactError(f"the branches pool in different ways: {names}")
        if any(a != 1 for segment in self._stack for a in self._ahead[segment.value]):
            raise InexactError("a pool would read positions that a stride of the other branch has discarded")
        self.nonlinear.append(Nonlinear(len(self.linear_steps) - 1, stage=layers[0]))
        self._stack = tuple(self._made(index, own[index]) for index in range(len(self._stack)))
        if self._sizes is not None:
            self._sizes = self.problem.value(self._stack[0].value).sizes
            self._check_fit()
