"""A finished network read as a stack: linear layers one behind another, and what acts on single channels between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.affine import Affine
from rmfx.algebra.pointwise import is_pointwise
from rmfx.algebra.rows import Rows, columns_read, negated_rows, read_rows
from rmfx.graph.bounds import acts_on_channels, is_plain_flatten, keeps_channels
from rmfx.graph.facts import is_product, module_of
from rmfx.graph.gates import read_gate
from rmfx.graph.linear import affine_of, dims_of, mixes

ROWS = "weight_rows"  # node.meta: what the rows of a layer read
NEGATIONS = "negated_rows"  # node.meta: which of them are others times -1


@dataclass(frozen=True, eq=False)
class Stage:
    """A layer that acts on each channel by itself: an activation.

    Attributes:
        node: it.
        source: what it acts on.
        inside: all nodes it consists of, in graph order.
        gate: where it is a product with a gate that is computed aside from ``source``.
    """

    node: fx.Node
    source: fx.Node
    inside: tuple[fx.Node, ...]
    gate: Gate | None = None


@dataclass(frozen=True, eq=False)
class Gate:
    """The side path of a gate: ``source -> pool -> reader -> ... -> spreader -> activation``.

    Attributes:
        before, reader, between, spreader, after: its nodes; ``reader`` and ``spreader`` mix channels.
        read: which channels of the source the reader reads, bool ``[C]``.
        ones: on which channels the factor is exactly 1.
    """

    before: tuple[fx.Node, ...]
    reader: fx.Node
    between: tuple[fx.Node, ...]
    spreader: fx.Node
    after: tuple[fx.Node, ...]
    read: Tensor
    ones: Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """A linear layer and the stages behind it, up to the next linear layer."""

    layer: fx.Node
    stages: tuple[Stage, ...]

    @property
    def affine(self) -> Affine:
        """The layer's map."""
        return layer_map(self.layer)

    @property
    def rows(self) -> Rows:
        """What the rows of the layer's map read."""
        return rows_of(self.layer)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes, in graph order."""
        return self.layer, *(node for stage in self.stages for node in stage.inside)


def layer_map(layer: fx.Node) -> Affine:
    """The map of a convolution or linear layer."""
    dims = dims_of(layer)
    assert dims is not None
    return affine_of(layer, dims)


def rows_of(layer: fx.Node) -> Rows:
    """What the rows of a convolution or linear layer read; read once."""
    if ROWS not in layer.meta:
        layer.meta[ROWS] = read_rows(layer_map(layer))
    found: Rows = layer.meta[ROWS]
    return found


def negations_of(layer: fx.Node) -> list[tuple[int, int]]:
    """Pairs of rows of a layer of which one is the other times -1; looked for once."""
    if NEGATIONS not in layer.meta:
        layer.meta[NEGATIONS] = negated_rows(layer_map(layer))
    found: list[tuple[int, int]] = layer.meta[NEGATIONS]
    return found


def is_layer(node: fx.Node) -> bool:
    """Whether ``node`` is a convolution or linear layer of one input."""
    return mixes(node) and len(node.all_input_nodes) == 1


def steps_before(last: fx.Node) -> tuple[Step, ...]:
    """The steps in front of the layer ``last``, back to the latest two that no channel is carried through.

    One alone may be a projection of what is carried up to it.
    """
    steps: list[Step] = []
    stages: list[Stage] = []
    dims = dims_of(last)
    assert dims is not None
    node, readers = last.all_input_nodes[0], {last}
    while set(node.users) <= readers:
        stage = stage_of(node, dims)
        if stage is not None:
            stages.insert(0, stage)
            node, readers = stage.source, set(stage.inside)
        elif is_layer(node) and dims_of(node) == dims:
            steps.insert(0, Step(node, tuple(stages)))
            if not any(step.rows.carrying for step in steps[:2]) and len(steps) > 1:
                break
            stages, readers = [], {node}
            node = node.all_input_nodes[0]
        else:
            break
    return tuple(steps)


def stages_behind(layer: fx.Node) -> tuple[Stage, ...] | None:
    """The stages between ``layer`` and the next one, or ``None`` where anything else reads any of them."""
    dims = dims_of(layer)
    assert dims is not None
    node, stages = layer, []
    while node.users:
        reader = max(node.users)  # of a gate and its product, the product
        stage = stage_of(reader, dims)
        if stage is None or stage.source is not node or not set(node.users) <= set(stage.inside):
            alone = len(node.users) == 1 and is_layer(reader) and dims_of(reader) == dims
            return tuple(stages) if alone else None
        stages.append(stage)
        node = reader
    return None


def stage_of(node: fx.Node, dims: int) -> Stage | None:
    """The stage that ``node`` ends, among layers of ``dims`` spatial dimensions."""
    module = module_of(node)
    if module is not None and is_pointwise(module) and acts_on_channels(module, dims):
        return Stage(node, node.all_input_nodes[0], (node,))
    return _gate_stage(node) if dims and is_product(node) else None


def _gate_stage(product: fx.Node) -> Stage | None:
    path = read_gate(product)
    if isinstance(path, str) or path.reads != (path.data,) or any(_branches(node) for node in path.side):
        return None
    side = path.side
    layers = [node for node in side if is_layer(node)]
    if len(layers) < 2 or any(module_of(node) is None for node in side):
        return None
    first, last = side.index(layers[0]), side.index(layers[-1])
    before, after = side[:first], side[last + 1 :]
    if not all(keeps_channels(_module(n)) or is_plain_flatten(n) for n in before) or len(after) > 1:
        return None
    gate = _gate(before, layers[0], side[first + 1 : last], layers[-1], after)
    return Stage(product, path.data, (*side, product), gate) if gate is not None else None


def _branches(node: fx.Node) -> bool:
    return len(node.users) != 1 or len(node.all_input_nodes) != 1


def _gate(
    before: tuple[fx.Node, ...],
    reader: fx.Node,
    between: tuple[fx.Node, ...],
    spreader: fx.Node,
    after: tuple[fx.Node, ...],
) -> Gate | None:
    activation = _module(after[0]) if after else nn.Identity()
    if not (is_pointwise(activation) or not after) or activation.state_dict():
        return None
    read = layer_map(reader)
    used = columns_read(read, torch.ones(read.out_channels, dtype=torch.bool))
    rows = rows_of(spreader)
    ones = rows.zero & (activation(rows.bias) == 1.0)
    if len(ones) != read.in_channels:
        return None
    return Gate(before, reader, between, spreader, after, used, ones)


def _module(node: fx.Node) -> nn.Module:
    module = module_of(node)
    assert module is not None
    return module
