"""A run of carried channels as a shortcut beside a narrower stack: the layers of both, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from rmfx.algebra.affine import Affine, Weights, compose, dense, rounded
from rmfx.algebra.bounds import Bounds, activation_bounds
from rmfx.algebra.narrow import cheapest, part
from rmfx.algebra.rows import columns_read
from rmfx.algebra.stacking import Block, stack
from rmfx.errors import InexactError
from rmfx.graph.cost import positions_of
from rmfx.graph.facts import called, is_sum
from rmfx.graph.linear import map_of
from rmfx.graph.rule import Price
from rmfx.layout.narrowing import narrowed, plainest
from rmfx.layout.plainly import Layer, plainly
from rmfx.layout.runs import Run
from rmfx.layout.stack import Stage, Step

Layers = dict[fx.Node, tuple[Layer, ...]]


@dataclass(frozen=True, eq=False)
class Lowering:
    """What a run becomes.

    Attributes:
        run: it.
        kept: the channels that stay behind each step.
        layers: for every node that changes, the layers in its place.
        shortcut: from the input of the run's first layer to the sum behind its last one; none for the input itself.
        price: of the run and of this.
        beside: whether the shortcut ends in front of the last layer, in a concat, instead of in a sum behind it.
    """

    run: Run
    kept: tuple[Tensor, ...]
    layers: Layers
    shortcut: tuple[Layer, ...]
    price: Price
    beside: bool = False


def ways_of(run: Run) -> list[tuple[Tensor, ...]]:
    """The channels that may stay behind each step; none where only carried ones are there, or a gate reads them.

    Channels that nothing read before need not stay, but may: groups must be equally wide.
    """
    few, many = _kept(run, True), _kept(run, False)
    same = few is not None and many is not None and all(map(torch.equal, few, many))
    return [kept for kept in ((few,) if same else (few, many)) if kept is not None]


def lower_run(run: Run, beside: bool = False) -> Lowering | str:
    """The cheapest way to lower ``run`` (which has any, :func:`ways_of`), or a reason where that would cost more."""
    found = [lowering for kept in ways_of(run) for lowering in _lowerings(run, kept, beside)]
    best = min(found, key=lambda lowering: (lowering.price.macs_after, lowering.price.params_after))
    price = best.price
    if (price.macs_after, price.params_after) < (price.macs_before, price.params_before):
        return best
    return (
        f"beside a shortcut, the layers up to {run.last.name} would take {price.growth:.2f} times the MACs and "
        f"{price.params_after} parameters instead of {price.params_before}"
    )


def _kept(run: Run, drop: bool) -> tuple[Tensor, ...] | None:
    last = map_of(run.last)
    carried = torch.zeros(last.in_channels, dtype=torch.bool)
    carried[run.channels] = True
    read_before = columns_read(last, torch.ones(last.out_channels, dtype=torch.bool))
    read, groups = read_before & ~carried, last.groups
    kept: list[Tensor] = []
    for step in reversed(run.steps):
        for stage in step.stages:
            read = read | stage.gate.read if stage.gate is not None else read
        stays = read & ~_zeros(step) if drop else read | (~read_before & _in_group(read, groups))
        if not bool(stays.any()) or (not kept and bool((stays & carried).any())):
            return None  # nothing would be left, or a gate is computed from what is carried
        kept.insert(0, stays.nonzero().flatten())
        read_before = columns_read(step.affine, torch.ones_like(stays))
        read, groups = columns_read(step.affine, stays), step.affine.groups
    return tuple(kept)


def _in_group(marked: Tensor, groups: int) -> Tensor:
    """The channels that share a group with a marked one."""
    return marked.reshape(groups, -1).any(1).repeat_interleave(len(marked) // groups)


def _zeros(step: Step) -> Tensor:
    """The channels that are 0 behind the step, whatever its input."""
    rows = step.rows
    values = Bounds.of((torch.zeros_like(rows.bias), torch.zeros_like(rows.bias)))
    zero = rows.zero & (rows.bias == 0)
    for stage in step.stages:
        if stage.gate is None:
            values = activation_bounds(called(stage.node), values)
        elif is_sum(stage.node):
            zero &= stage.gate.passes
    return zero & (values.low == 0) & (values.high == 0)


def _lowerings(run: Run, kept: tuple[Tensor, ...], beside: bool) -> Iterator[Lowering]:
    trains = any(p.requires_grad for p in called(run.last).parameters())
    layers: Layers = {}
    columns = torch.arange(run.steps[0].affine.in_channels)
    for step, rows in zip(run.steps, kept, strict=True):
        layers[step.layer] = _simple(part(step.affine, rows, columns), step.affine, trains)
        for stage in step.stages:
            layers |= _narrow_stage(stage, rows, trains)
        columns = rows
    last = map_of(run.last)
    merged = part(last, torch.arange(last.out_channels), columns)
    if beside:
        entry = [(layer, run.steps[-1].layer) for layer in plainly(cheapest(run.entry), trains)]
        ways = {**layers, run.last: (_side_by_side(merged, run.exit),)}
        yield Lowering(run, kept, ways, tuple(layer for layer, _ in entry), _price(run, ways, entry), True)
        return
    for shortcut, offset in _shortcuts(run, trains):
        own = merged if offset is None else _with_bias(merged, offset)
        ways = {**layers, run.last: _simple(own, last, trains)}
        yield Lowering(run, kept, ways, tuple(layer for layer, _ in shortcut), _price(run, ways, shortcut))


def _side_by_side(first: Affine, second: Affine) -> Affine:
    """The sum of both, as one map of their inputs side by side."""
    rows, width = torch.arange(first.out_channels), first.in_channels
    columns = torch.arange(width + second.in_channels)
    blocks = (Block(first, rows, columns[:width]), Block(second, rows, columns[width:]))
    return stack(blocks, len(columns), len(rows))


def _simple(new: Affine, old: Affine, trains: bool) -> tuple[Layer, ...]:
    return (new,) if new is old or old.diagonal else plainly(new, trains)


def _narrow_stage(stage: Stage, kept: Tensor, trains: bool) -> Layers:
    if stage.gate is None:
        return {stage.node: (plainest(narrowed(called(stage.node), kept)),)}
    layers = {}
    for node in stage.gate.layers:
        old = map_of(node)
        rows, columns = torch.arange(old.out_channels), torch.arange(old.in_channels)
        new = part(old, kept, columns) if node is stage.gate.spreader else part(old, rows, kept)
        layers[node] = _simple(new, old, trains)
    return layers


Placed = tuple[Layer, fx.Node]  # a layer, and the node at whose positions it stands


def _shortcuts(run: Run, trains: bool) -> Iterator[tuple[list[Placed], Tensor | None]]:
    """Layers of the shortcut, and what it adds to the bias of the last layer: as two maps, and as one."""
    entry, end = cheapest(run.entry), cheapest(run.exit)
    first, second = plainly(entry, trains), plainly(end, trains)
    yield [*((layer, run.steps[-1].layer) for layer in first), *((layer, run.last) for layer in second)], None
    whole = _composed(end, entry)
    if whole is not None:
        bias = whole.weights()[1]
        yield [(layer, run.last) for layer in plainly(_biased(whole, None), trains)], bias


def _composed(outer: Affine, inner: Affine) -> Affine | None:
    """Both maps as one, or ``None`` where padding stands between them."""
    try:
        return cheapest(dense(compose(outer, inner)))
    except InexactError:
        return None


def _with_bias(affine: Affine, offset: Tensor) -> Affine:
    bias = affine.weights()[1]
    return _biased(affine, offset if bias is None else bias + offset)


def _biased(affine: Affine, bias: Tensor | None) -> Affine:
    def compute() -> Weights:
        return affine.weights()[0], bias

    return replace(affine, has_bias=bias is not None, compute=rounded(compute), stored=None)


def _price(run: Run, layers: Layers, shortcut: Sequence[Placed]) -> Price:
    placed = [*((layer, node) for node, new in layers.items() for layer in new), *shortcut]
    positions = _positions(run)
    old = [called(node) for node in layers]
    before = [map_of(node).macs_per_position * positions[node] for node in layers if node in positions]
    return Price(
        float(sum(before)),
        float(sum(layer.macs_per_position * positions[node] for layer, node in placed if isinstance(layer, Affine))),
        sum(p.numel() for module in old for p in module.parameters()),
        sum(_parameters(layer) for layer, _ in placed),
    )


def _positions(run: Run) -> dict[fx.Node, float]:
    """Output positions of every layer; without shapes, the input counts as one and a gate as none."""
    found: dict[fx.Node, float] = {}
    density = 1.0
    for layer in (*(step.layer for step in run.steps), run.last):
        grid = map_of(layer).grid
        for stride in grid.stride:
            density /= stride
        found[layer] = positions_of(layer, grid.dims) or density
    for stage in (stage for step in run.steps for stage in step.stages):
        for layer in stage.gate.layers if stage.gate is not None else ():
            found[layer] = positions_of(layer, map_of(layer).grid.dims) or 0.0
    return found


def _parameters(layer: Layer) -> int:
    return layer.parameters if isinstance(layer, Affine) else sum(p.numel() for p in layer.parameters())
