"""Chooses for each linear step of a stack the cheapest grouped form, and with it the order of channels.

A stack holds segments side by side. A *layout* says where the channels of each segment lie: channel ``c`` of a
segment at ``base + (c // run) * stride + c % run``. The natural layout has every segment contiguous. A grouped
convolution wants the channels of each of its groups together, so its layouts may interleave segments or leave
gaps (dead channels, zero before and after); a dense one takes any layout. What a step emits, the next one reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd

import torch
from torch import Tensor

from rmfx.algebra.affine import Affine
from rmfx.algebra.grid import align
from rmfx.algebra.stacking import Block, stack


@dataclass(frozen=True)
class Spread:
    """Where one segment's channels lie in a stack."""

    base: int
    stride: int
    run: int

    def positions(self, channels: int) -> Tensor:
        """The position of every channel, ``[channels]``."""
        index = torch.arange(channels)
        return self.base + index // self.run * self.stride + index % self.run


@dataclass(frozen=True)
class Layout:
    """Where all segments of a stack lie, and how wide it is with its dead channels."""

    spreads: tuple[Spread, ...]
    width: int

    @staticmethod
    def natural(widths: Sequence[int]) -> Layout:
        """All segments contiguous, in order."""
        bases = [sum(widths[:i]) for i in range(len(widths))]
        return Layout(tuple(Spread(b, w, w) for b, w in zip(bases, widths, strict=True)), sum(widths))


@dataclass(frozen=True, eq=False)
class LinearStep:
    """A block matrix of maps from the segments before to the segments after.

    Attributes:
        blocks: (segment after, segment before) to the map between them; absent ones are zero.
        before, after: channels of each segment.
        positions: output positions per sample (or per fork position, where sizes are unknown).
    """

    blocks: Mapping[tuple[int, int], Affine]
    before: tuple[int, ...]
    after: tuple[int, ...]
    positions: float
    taps: int


@dataclass(frozen=True)
class Form:
    """How a linear step is emitted: its groups and the layouts it reads and writes."""

    groups: int
    before: Layout
    after: Layout

    def macs(self, step: LinearStep) -> float:
        """MACs of the step in this form."""
        return self.before.width // self.groups * self.after.width * step.taps * step.positions


def choose_forms(steps: Sequence[LinearStep], *, dense: bool = False) -> tuple[Form, ...]:
    """The cheapest forms of a sequence of linear steps, each reading the layout the one before writes.

    The first reads and the last writes the natural layout. Pointwise steps in between keep layouts. Shortest path
    over layouts: the states between two steps are the layouts either of them knows a grouped form for.

    Args:
        dense: group no step of more than one block.
    """
    grouped = [() if dense and len(step.blocks) > 1 else tuple(_grouped_forms(step)) for step in steps]
    states = _boundaries(steps, grouped)
    best: dict[Layout, tuple[float, tuple[Form, ...]]] = {states[0][0]: (0.0, ())}
    for index, step in enumerate(steps):
        reached: dict[Layout, tuple[float, tuple[Form, ...]]] = {}
        for before, (cost, forms) in best.items():
            for after in states[index + 1]:
                form = _cheapest(step, before, after, grouped[index])
                total = cost + form.macs(step)
                if after not in reached or total < reached[after][0]:
                    reached[after] = (total, (*forms, form))
        best = reached
    return best[states[-1][0]][1]


def _boundaries(steps: Sequence[LinearStep], grouped: Sequence[Sequence[Form]]) -> list[list[Layout]]:
    states = [[Layout.natural(steps[0].before)]]
    for index, step in enumerate(steps):
        layouts = [Layout.natural(step.after)]
        if index + 1 < len(steps):
            layouts += [form.after for form in grouped[index]] + [form.before for form in grouped[index + 1]]
        states.append(list(dict.fromkeys(layouts)))
    return states


def _cheapest(step: LinearStep, before: Layout, after: Layout, grouped: Sequence[Form]) -> Form:
    fitting = [form for form in grouped if form.before == before and form.after == after]
    return min([*fitting, Form(1, before, after)], key=lambda form: form.macs(step))


def _grouped_forms(step: LinearStep) -> list[Form]:
    """Groups side by side, of the shape of one of the step's components or of the largest.

    A *component* is a set of segments that the blocks couple: carried ones alone, split copies that are recombined,
    everything that feeds one convolution. Its channels are interleaved, so that each of its groups lies together.
    Where group widths differ, several groups of one component share a wider one; where they do not divide, the last
    group is filled up with dead channels.
    """
    if not next(iter(step.blocks.values())).grid.dims:
        return []  # nn.Linear has no groups
    components = _components(step)
    if sum(len(c.rows) + len(c.columns) for c in components) < len(step.before) + len(step.after):
        return []  # a segment that nothing reads
    shapes = [component.shape(step) for component in components]
    forms = []
    for wide, high in {*shapes, (max(a for a, _ in shapes), max(b for _, b in shapes))}:
        if any(a > wide or b > high for a, b in shapes):
            continue
        form = _side_by_side(step, components, shapes, wide, high)
        if form.groups > 1:
            forms.append(form)
    return forms


@dataclass(frozen=True)
class _Component:
    """Coupled segments, after and before the step, and the number of groups that all blocks among them have."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    groups: int

    def shape(self, step: LinearStep) -> tuple[int, int]:
        """Channels that one group reads and writes."""
        read = sum(step.before[column] for column in self.columns)
        return read // self.groups, sum(step.after[row] for row in self.rows) // self.groups


def _components(step: LinearStep) -> list[_Component]:
    found: list[tuple[set[int], set[int], list[Affine]]] = []
    for (row, column), block in step.blocks.items():
        rows, columns, blocks = {row}, {column}, [block]
        for other in [c for c in found if row in c[0] or column in c[1]]:
            rows, columns, blocks = rows | other[0], columns | other[1], blocks + other[2]
            found.remove(other)
        found.append((rows, columns, blocks))
    found.sort(key=lambda component: min(component[1]))
    return [
        _Component(tuple(sorted(rows)), tuple(sorted(columns)), reduce(gcd, (block.groups for block in blocks)))
        for rows, columns, blocks in found
    ]


def _side_by_side(
    step: LinearStep, components: Sequence[_Component], shapes: Sequence[tuple[int, int]], wide: int, high: int
) -> Form:
    before: list[Spread] = [Spread(0, 1, 1)] * len(step.before)
    after: list[Spread] = [Spread(0, 1, 1)] * len(step.after)
    groups = 0
    for component, (a, b) in zip(components, shapes, strict=True):
        share = max(min(wide // a, high // b), 1)
        coupled = len(component.rows) > 1 or len(component.columns) > 1
        if coupled and (wide != share * a or high != share * b):
            share = 1  # interleaved groups only share a wider one that they fill
        _place(before, component.columns, step.before, component.groups, groups, wide, share * a, share)
        _place(after, component.rows, step.after, component.groups, groups, high, share * b, share)
        groups += -(-component.groups // share)
    layouts = [
        Layout(_as_natural(tuple(spreads), widths), groups * width)
        for spreads, widths, width in ((before, step.before, wide), (after, step.after, high))
    ]
    return Form(groups, *layouts)


def _place(
    spreads: list[Spread],
    segments: Sequence[int],
    widths: Sequence[int],
    groups: int,
    first: int,
    width: int,
    used: int,
    share: int,
) -> None:
    """Spread the segments of a component over its groups of ``width`` channels, of which ``used`` are taken."""
    if len(segments) == 1:
        (segment,) = segments
        spreads[segment] = Spread(first * width, width, used)
        return
    start = first * width
    for segment in segments:
        run = widths[segment] // groups
        spreads[segment] = Spread(start, width // share if used == width else width, run)
        start += run


def _as_natural(spreads: tuple[Spread, ...], widths: Sequence[int]) -> tuple[Spread, ...]:
    """Write gapless spreads the way the natural layout writes them, so that equal layouts compare equal."""
    return tuple(
        Spread(s.base, width, width) if s.stride == s.run or width <= s.run else s
        for s, width in zip(spreads, widths, strict=True)
    )


def build(step: LinearStep, form: Form) -> Affine:
    """The step as one map, in ``form``."""
    trivial = len(step.blocks) == 1 and form.before.width == step.before[0] and form.after.width == step.after[0]
    if trivial and next(iter(step.blocks.values())).groups == form.groups:
        return next(iter(step.blocks.values()))
    rows = [s.positions(w) for s, w in zip(form.after.spreads, step.after, strict=True)]
    columns = [s.positions(w) for s, w in zip(form.before.spreads, step.before, strict=True)]
    blocks = [Block(affine, rows[o], columns[i]) for (o, i), affine in step.blocks.items()]
    return stack(blocks, form.before.width, form.after.width, form.groups)


def dirac_taps(step: LinearStep, form: Form, key: tuple[int, int], most: int = 4) -> tuple[tuple[int, ...], ...]:
    """Weight indices of some taps of the carrying block ``key``, spread over its channels."""
    row, column = key
    grids = [block.grid for block in step.blocks.values()]
    common, embeddings = align(grids)
    start = embeddings[list(step.blocks).index(key)].start
    channels = step.after[row]
    height, width = form.after.width // form.groups, form.before.width // form.groups
    picks = torch.arange(channels)[:: max(channels // most, 1)][:most]
    rows = form.after.spreads[row].positions(channels)[picks].tolist()
    columns = form.before.spreads[column].positions(channels)[picks].tolist()
    assert common.dims == len(start)
    return tuple((r, c - r // height * width, *start) for r, c in zip(rows, columns, strict=True))
