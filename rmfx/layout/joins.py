"""What the two passes that remove sums share: reading a region, the plan of a rewrite, carrying it out."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from torch import fx

from rmfx.algebra.affine import Affine, compose
from rmfx.algebra.pointwise import NORMS
from rmfx.errors import InexactError
from rmfx.graph.cost import chain_cost
from rmfx.graph.facts import channels_of, is_dropout, module_of, range_of, shape_of
from rmfx.graph.linear import affine_of, is_linear, mixes
from rmfx.graph.region import Chain, Region
from rmfx.graph.rule import Price
from rmfx.layout.problem import Layer, Solution, Value

if TYPE_CHECKING:
    from rmfx.graph.editor import Editor


TAPS = "carried_taps"  # node.meta: weight indices of Dirac taps, by the origin of the sum they were put there for


@dataclass(frozen=True, eq=False)
class JoinPlan:
    """A sum that can be removed: its region, the layers that replace it, and what they cost.

    Attributes:
        kind: of the region (:attr:`rmfx.graph.region.Region.kind`).
        counted: whether MACs are per sample (else per fork position, sizes being unknown).
        conditions: input sizes for which alone the rewrite is exact.
        dropouts: names of dropout layers that disappear.
    """

    region: Region
    solution: Solution
    price: Price
    kind: str
    counted: bool
    conditions: tuple[str, ...]
    dropouts: tuple[str, ...]

    @property
    def carrier(self) -> str | None:
        """The carriers used, joined by ``+``; ``None`` where nothing passes a nonlinearity."""
        return "+".join(sorted(self.solution.carriers)) or None


def join_plan(region: Region, solution: Solution, dims: int) -> JoinPlan:
    """The plan of replacing ``region`` by ``solution``, with its price."""
    shape = shape_of(region.fork)
    conditions: tuple[str, ...] = ()
    if solution.sized and shape is not None:
        conditions = (f"exact for the example inputs' sizes only, where {region.fork.name} has {tuple(shape[2:])}",)
    price = _price(region, solution, dims)
    dropouts = tuple(str(node.target) for node in (*region.branch, *region.shortcut) if is_dropout(node))
    return JoinPlan(region, solution, price, region.kind, shape is not None, conditions, dropouts)


def check_operands(region: Region) -> str | None:
    """Why the two operands of the sum are not simply added element by element, or ``None`` where they are."""
    operands = region.join.all_input_nodes
    shapes = [shape_of(node) for node in operands]
    if len(operands) == 2 and None not in shapes and shapes[0] != shapes[1]:
        return f"the sum broadcasts {tuple(shapes[0] or ())} with {tuple(shapes[1] or ())}"
    shape, dims = shape_of(region.fork), region.dims
    if dims is None:
        return "no convolution, linear or norm layer stands between the fork and the sum"
    if dims and shape is not None and len(shape) != dims + 2:
        return f"the layers take batched inputs of {dims + 2} dimensions, the example input gives {len(shape)}"
    return None


def _value(node: fx.Node, channels: int, dims: int) -> Value:
    """A node's value as layouts see it."""
    shape = shape_of(node)
    sizes = None if shape is None else tuple(shape[2:]) if dims else ()
    return Value(channels, range_of(node), sizes)


def fork_value(region: Region, dims: int) -> Value:
    """The fork's value; the first layer of a chain that mixes channels tells how many there are.

    Raises:
        InexactError: when its number of channels is unknown.
    """
    mixing = (next(filter(mixes, chain), None) for chain in (region.branch, region.shortcut))
    told = [affine_of(node, dims).in_channels for node in mixing if node is not None]
    channels = told[0] if told else channels_of(region.fork, dims)
    if channels is None:
        raise InexactError(f"the number of channels at {region.fork.name} is unknown: pass example_inputs")
    return _value(region.fork, channels, dims)


def read_chain(nodes: Chain, channels: int, dims: int, keep_norms: bool = False) -> tuple[Layer, ...]:
    """The layers of a chain, with norms and scales composed into a neighbouring map where that is exact.

    Args:
        channels: of the fork that the chain starts from.
        keep_norms: leave batch norms before a nonlinearity in place, as layers of their own.

    Dropouts are passed over: they would act on what is carried. The plan notes them.
    """
    layers: list[Layer] = []
    for index, node in enumerate(nodes):
        module = module_of(node)
        assert module is not None
        if is_dropout(node):
            continue
        affine = affine_of(node, dims, channels) if is_linear(node) else None
        channels = channels if affine is None else affine.out_channels
        value = _value(node, channels, dims)
        if affine is None:
            layers.append(Layer(str(node.target), module, value))
            continue
        if keep_norms and isinstance(module, NORMS) and not _only_linear(nodes[index:]):
            layers.append(Layer(str(node.target), module, value))
            continue
        layers.append(Layer(str(node.target), affine, value))
        _absorb_diagonal(layers)
    return tuple(layers)


def _only_linear(nodes: Chain) -> bool:
    return all(is_linear(node) or is_dropout(node) for node in nodes)


def _absorb_diagonal(layers: list[Layer]) -> None:
    """Compose the last two layers where one of them only scales channels: never costs a MAC."""
    if len(layers) < 2 or not (isinstance(layers[-1].map, Affine) and isinstance(layers[-2].map, Affine)):
        return
    outer, inner = layers[-1].map, layers[-2].map
    if not (outer.diagonal or inner.diagonal):
        return
    try:
        composed = compose(outer, inner)
    except InexactError:  # a shift before zero padding: it stays a layer of its own
        return
    name = layers[-2].name if outer.diagonal else layers[-1].name
    layers[-2:] = [Layer(name, composed, layers[-1].value)]


def composed(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """A chain of linear maps as one, where every composition is exact; else as it was."""
    if len(layers) < 2 or not all(isinstance(layer.map, Affine) for layer in layers):
        return layers
    total = layers[0].map
    assert isinstance(total, Affine)
    for layer in layers[1:]:
        assert isinstance(layer.map, Affine)
        try:
            total = compose(layer.map, total)
        except InexactError:
            return layers
    return (Layer(layers[-1].name, total, layers[-1].value),)


def _price(region: Region, solution: Solution, dims: int) -> Price:
    """The region's cost before and after."""
    chains = [chain_cost(chain, dims) for chain in (region.branch, region.shortcut)]
    shape = shape_of(region.fork)
    rows = prod(shape[1:-1]) if shape is not None and not dims else 1  # a linear layer acts on every row
    after = sum(
        layer.map.parameters if isinstance(layer.map, Affine) else sum(p.numel() for p in layer.map.parameters())
        for layer in solution.layers
    )
    return Price(sum(macs for macs, _ in chains), solution.macs * rows, sum(params for _, params in chains), after)


def carry_out(plan: JoinPlan, editor: Editor) -> fx.Node:
    """Insert the plan's layers before the sum, hand its readers over, erase what they replace."""
    region = plan.region
    node = region.fork
    new: list[fx.Node] = []
    for layer in plan.solution.layers:
        name = layer.name or editor.fresh(region.join.meta.get("place", ""), "carry")
        if isinstance(layer.map, Affine):
            node = editor.linear(layer.map, node, region.join, name)
        else:
            node = editor.layer(layer.map, node, region.join, name)
        new.append(node)
    for index, tap in plan.solution.carried:
        new[index].meta.setdefault(TAPS, {}).setdefault(region.join.meta.get("origin"), []).append(tap)
    editor.replace(region.join, node)
    editor.erase([region.join, *reversed(region.branch), *reversed(region.shortcut)])
    return node
