"""A finished network read as a stack: linear layers one behind another, and what acts on single channels between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.affine import Affine
from rmfx.algebra.pointwise import NORMS, is_pointwise
from rmfx.algebra.rows import Rows, columns_read, negated_rows, read_rows
from rmfx.graph.bounds import acts_on_channels, is_plain_flatten, keeps_channels
from rmfx.graph.facts import called, is_product, is_sum, module_of, shape_of, values_read
from rmfx.graph.gates import read_gate
from rmfx.graph.linear import dims_of, map_of, mixes, norm_obstacle

ROWS = "weight_rows"  # node.meta: what the rows of a layer read
NEGATIONS = "negated_rows"  # node.meta: which of them are others times -1


@dataclass(frozen=True, eq=False)
class Stage:
    """A layer that acts on each channel by itself: an activation or a batch norm.

    Attributes:
        node: it.
        source: what it acts on.
        inside: all nodes it consists of, in graph order.
        gate: where it is a product with a gate that is computed aside from ``source``, or a sum with such a term.
    """

    node: fx.Node
    source: fx.Node
    inside: tuple[fx.Node, ...]
    gate: Gate | None = None


@dataclass(frozen=True, eq=False)
class Gate:
    """What a gate is computed by: ``source -> pools -> readers -> ... -> spreader -> activation``.

    What is added is no more than a spreader: nothing of the source enters.

    Attributes:
        side: its nodes, in graph order.
        readers, spreader: those that mix channels first and last.
        wide: those that have the channels of the source: the pools, and the activation.
        read: which channels of the source the readers read, bool ``[C]``.
        passes: the channels that it leaves exactly as they are.
    """

    side: tuple[fx.Node, ...]
    readers: tuple[fx.Node, ...]
    spreader: fx.Node
    wide: tuple[fx.Node, ...]
    read: Tensor
    passes: Tensor

    @property
    def layers(self) -> tuple[fx.Node, ...]:
        """The nodes that become narrower."""
        return *self.readers, self.spreader


@dataclass(frozen=True, eq=False)
class Step:
    """A linear layer and the stages behind it, up to the next linear layer."""

    layer: fx.Node
    stages: tuple[Stage, ...]

    @property
    def affine(self) -> Affine:
        """The layer's map."""
        return map_of(self.layer)

    @property
    def rows(self) -> Rows:
        """What the rows of the layer's map read."""
        return rows_of(self.layer)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes, in graph order."""
        return self.layer, *(node for stage in self.stages for node in stage.inside)


def rows_of(layer: fx.Node) -> Rows:
    """What the rows of a convolution or linear layer read; read once."""
    if ROWS not in layer.meta:
        layer.meta[ROWS] = read_rows(map_of(layer))
    found: Rows = layer.meta[ROWS]
    return found


def negations_of(layer: fx.Node) -> list[tuple[int, int]]:
    """Pairs of rows of a layer of which one is the other times -1; looked for once."""
    if NEGATIONS not in layer.meta:
        layer.meta[NEGATIONS] = negated_rows(map_of(layer))
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
        elif _is_layer_of(node, dims):
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
    node, stages = layer, list[Stage]()
    while node.users:
        reader = max(node.users)  # of a gate and its product, the product
        stage = stage_of(reader, dims)
        if stage is None or stage.source is not node or not set(node.users) <= set(stage.inside):
            alone = len(node.users) == 1 and _is_layer_of(reader, dims)
            return tuple(stages) if alone else None
        stages.append(stage)
        node = reader
    return None


def stage_of(node: fx.Node, dims: int) -> Stage | None:
    """The stage that ``node`` ends, among layers of ``dims`` spatial dimensions."""
    module = module_of(node)
    if module is not None and (
        _is_norm_of(node, module, dims) or (is_pointwise(module) and acts_on_channels(module, dims))
    ):
        return Stage(node, node.all_input_nodes[0], (node,))
    if is_sum(node):
        return _term_stage(node, dims)
    return _gate_stage(node, dims) if is_product(node) else None


def _is_norm_of(node: fx.Node, module: nn.Module, dims: int) -> bool:
    """Whether ``node`` is a batch norm with statistics, of the channels of layers of ``dims`` spatial dimensions."""
    if not isinstance(module, NORMS) or norm_obstacle(module):
        return False
    shape = shape_of(node)
    return dims_of(node) == dims if shape is None else len(shape) == dims + 2


def _gate_stage(product: fx.Node, dims: int) -> Stage | None:
    path = read_gate(product)
    if isinstance(path, str) or path.factor not in path.side:
        return None
    side, spreader = path.side, path.factor
    after = () if is_layer(spreader) or not _is_activation(spreader) else (spreader,)
    spreader = spreader.all_input_nodes[0] if after else spreader
    pools, readers = _readers(path.data, set(side), dims)
    if not _is_layer_of(spreader, dims) or len(spreader.users) != 1 or readers is None or spreader in readers:
        return None
    channels = map_of(spreader).out_channels
    maps = [map_of(reader) for reader in readers]
    if any(each.in_channels != channels for each in maps):
        return None
    read = torch.zeros(channels, dtype=torch.bool)
    for each in maps:
        read |= columns_read(each, torch.ones(each.out_channels, dtype=torch.bool))
    activation = called(after[0]) if after else nn.Identity()
    rows = rows_of(spreader)
    gate = Gate(side, readers, spreader, (*pools, *after), read, rows.zero & (activation(rows.bias) == 1.0))
    return Stage(product, path.data, (*side, product), gate)


def _term_stage(node: fx.Node, dims: int) -> Stage | None:
    """The stage of a sum with what a layer gives that leaves channels alone."""
    for spreader in node.all_input_nodes if len(node.all_input_nodes) == 2 else ():
        if not _is_layer_of(spreader, dims) or len(spreader.users) != 1:
            continue
        rows = rows_of(spreader)
        passes = rows.zero & (rows.bias == 0)
        if bool(passes.any()):
            (source,) = (operand for operand in node.all_input_nodes if operand is not spreader)
            gate = Gate((spreader,), (), spreader, (), torch.zeros_like(passes), passes)
            return Stage(node, source, (spreader, node), gate)
    return None


def _is_activation(node: fx.Node) -> bool:
    module = module_of(node)
    return module is not None and is_pointwise(module) and not module.state_dict() and len(node.users) == 1


def _is_layer_of(node: fx.Node, dims: int) -> bool:
    return is_layer(node) and dims_of(node) == dims


def _readers(data: fx.Node, side: set[fx.Node], dims: int) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...] | None]:
    """The pools and the layers by which a side path reads ``data``; no layers where it does so in another way."""
    pools: list[fx.Node] = []
    readers = []
    for reader in (user for user in data.users if user in side and data in values_read(user)):
        inside = dims
        while not is_layer(reader):
            flattens, module = is_plain_flatten(reader), module_of(reader)
            keeps = inside > 0 and module is not None and (keeps_channels(module) or flattens)
            if not keeps or len(reader.users) != 1:
                return (), None
            inside = 0 if flattens else inside
            pools.append(reader)
            (reader,) = reader.users
        if dims_of(reader) != inside:
            return (), None
        readers.append(reader)
    return tuple(pools), tuple(readers)
