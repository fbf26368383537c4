"""Reads a region of a graph as a problem: its tensors cut into parts along the channels, its nodes as ops on parts.

A concat is its operands side by side, a slice is some of the parts of what it slices: neither is an op. For that,
every tensor is cut wherever something inside the region cuts it; cuts pass through whatever acts on each channel alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import fx

from rmfx.algebra.affine import Affine, dirac, scaled
from rmfx.algebra.grid import Grid
from rmfx.algebra.pointwise import NORMS
from rmfx.algebra.restrict import Span, restrict, zero_part
from rmfx.errors import InexactError
from rmfx.graph.bounds import bounds_of
from rmfx.graph.facts import channels_of, is_dropout, is_sum, module_of, range_of, shape_of
from rmfx.graph.linear import affine_of, is_linear, mixes
from rmfx.graph.region import Region, is_concat
from rmfx.graph.stages import is_stage
from rmfx.layout.pieces import part_of
from rmfx.layout.problem import Gate, Op, Problem, Value, Wish
from rmfx.modules import ChannelPad, ChannelSlice

DEFAULT_WISH = Wish()


def read_region(
    region: Region,
    dims: int,
    channel_axis: int,
    carrier: Wish = DEFAULT_WISH,
    downsample: str = "cheaper",
    keep_norms: bool = False,
) -> Problem:
    """The problem of laying out ``region`` among layers of ``dims`` spatial dimensions.

    Args:
        channel_axis: of activations with one parameter per channel.
        carrier, downsample: wishes to pass on.
        keep_norms: leave batch norms before a nonlinearity in place, as ops of their own.

    Raises:
        InexactError: when a layer is no fixed map, or the number of channels is unknown.
    """
    reader = _Reader(region, dims, keep_norms, carrier.carrier == "shift")
    ops = tuple(reader.ops)
    return Problem(tuple(reader.fork), ops, tuple(reader.parts[region.join]), dims, carrier, downsample, channel_axis)


class _Reader:
    def __init__(self, region: Region, dims: int, keep_norms: bool, bounded: bool) -> None:
        self.region = region
        self.dims = dims
        self.bounded = bounded  # a shift needs tighter ranges than the graph has: those that weights prove
        self.gates = {gate.node: gate for gate in region.gates}
        self.nodes = (*region.nodes, region.join)
        self.affines: dict[fx.Node, Affine] = {}
        self.widths = {region.fork: self._fork_width()}
        for node in self.nodes:
            self.widths[node] = self._width(node)
        self.kept_norms = self._norms_to_keep() if keep_norms else set()
        self.cuts = _cuts(self)
        self.fork = [self._value(region.fork, length) for _, length in spans(self.cuts[region.fork])]
        self.parts: dict[fx.Node, list[int]] = {region.fork: list(range(len(self.fork)))}
        self.ops: list[Op] = []
        for unit, node in enumerate(self.nodes):
            self.parts[node] = self._read(node, unit)

    def _fork_width(self) -> int:
        """The first layers that mix channels tell how many there are, where the fork does not."""
        fork = self.region.fork
        for node in self.region.nodes:
            if mixes(node) and node.all_input_nodes[0] is fork:
                return affine_of(node, self.dims).in_channels
        known = channels_of(fork, self.dims)
        if known is None:
            known = self._first_mixed()
        if known is None:
            raise InexactError(f"the number of channels at {fork.name} is unknown: pass example_inputs")
        return known

    def _first_mixed(self) -> int | None:
        """Channels that a mixing layer reads behind layers that keep the fork's."""
        keeping = {self.region.fork}
        for node in self.region.nodes:
            if is_concat(node) or isinstance(module_of(node), (ChannelSlice, ChannelPad)):
                continue
            if not keeping.issuperset(node.all_input_nodes):
                continue  # a sum with something else may broadcast
            if mixes(node):
                return affine_of(node, self.dims).in_channels
            keeping.add(node)
        return None

    def _width(self, node: fx.Node) -> int:
        if is_concat(node):
            return sum(self.widths[operand] for operand in concat_operands(node, self.dims))
        if node in self.gates:
            return self.widths[self.gates[node].data]
        if is_sum(node):
            first, second = (self.widths[operand] for operand in sum_operands(node))
            if first != second:
                raise InexactError(f"the sum broadcasts {first} and {second} channels")
            return first
        source = self.widths[node.all_input_nodes[0]]
        if is_linear(node):
            self.affines[node] = affine_of(node, self.dims, source)
            return self.affines[node].out_channels
        return source

    def _norms_to_keep(self) -> set[fx.Node]:
        """Batch norms before a nonlinearity."""
        acted: set[fx.Node] = set()
        for node in reversed(self.nodes):
            linear = is_linear(node) or is_dropout(node) or is_sum(node) or is_concat(node)
            if not linear or node in self.gates or node in acted:
                acted |= set(node.all_input_nodes)
        return {node for node in self.nodes if node in acted and isinstance(module_of(node), NORMS)}

    def per_channel(self, node: fx.Node) -> bool:
        """Whether every channel of the node's value depends on the same channel of its input only."""
        if node in self.affines:
            affine = self.affines[node]
            return affine.groups == affine.in_channels == affine.out_channels
        return not (is_sum(node) or is_concat(node) or node in self.gates)

    # -- ops ----------------------------------------------------------------------------------------------------------

    def _read(self, node: fx.Node, unit: int) -> list[int]:
        if is_concat(node):
            return [part for operand in concat_operands(node, self.dims) for part in self.parts[operand]]
        if node in self.gates:
            return self._gate(node, unit)
        if is_sum(node):
            first, second = (self.parts[operand] for operand in sum_operands(node))
            return [self._sum(node, unit, pair) for pair in zip(first, second, strict=True)]
        (source,) = node.all_input_nodes
        if is_dropout(node):
            return self.parts[source]
        module = module_of(node)
        assert module is not None
        if isinstance(module, ChannelSlice):
            return self._slice(node, source)
        if node in self.affines and node not in self.kept_norms:
            return self._linear(node, unit, source)
        kind = "pointwise" if node in self.kept_norms or not is_stage(node) else "stage"
        if kind == "stage" and not self.dims:
            raise InexactError(f"{node.name} pools the features of a linear layer, which are no positions")
        found = []
        for part, span in zip(self.parts[source], spans(self.cuts[source]), strict=True):
            layer = part_of(module, span, self.widths[source])
            value = self._value(node, span[1])
            found.append(self._add(Op(kind, unit, str(node.target), (part,), value, layer=layer)))  # type: ignore[arg-type]
        return found

    def _sum(self, node: fx.Node, unit: int, terms: tuple[int, ...]) -> int:
        channels = self._channels(terms[0])
        maps = tuple(dirac(channels, Grid.sampling([1] * self.dims)) for _ in terms)
        return self._add(Op("sum", unit, node.name, terms, self._value(node, channels), maps))

    def _slice(self, node: fx.Node, source: fx.Node) -> list[int]:
        module = module_of(node)
        assert isinstance(module, ChannelSlice)
        start, end = module.start, module.start + module.length
        held = zip(self.parts[source], spans(self.cuts[source]), strict=True)
        return [part for part, (first, length) in held if start <= first and first + length <= end]

    def _linear(self, node: fx.Node, unit: int, source: fx.Node) -> list[int]:
        affine = self.affines[node]
        found = []
        for rows in spans(self.cuts[node]):
            maps: list[Affine] = []
            inputs: list[int] = []
            for part, columns in zip(self.parts[source], spans(self.cuts[source]), strict=True):
                block = restrict(affine, rows, columns)
                if block is not None:
                    inputs.append(part)
                    maps.append(scaled(block, 1.0, 0.0) if maps else block)
            if not maps:  # channels of zeros, as padding gives them
                first = self.parts[source][0]
                inputs, maps = [first], [zero_part(affine, rows, self._channels(first))]
            value = self._value(node, rows[1])
            found.append(self._add(Op("linear", unit, str(node.target), tuple(inputs), value, tuple(maps))))
        return found

    def _gate(self, node: fx.Node, unit: int) -> list[int]:
        path = self.gates[node]
        reads = tuple(tuple(self.parts[read]) for read in path.reads)
        shape = shape_of(path.factor)
        assert shape is not None
        channels = shape[1] if self.dims else shape[-1]
        if channels not in (1, self.widths[node]):
            raise InexactError(f"{node.name} multiplies {self.widths[node]} channels by {channels}")
        found = []
        for part, (start, length) in zip(self.parts[path.data], spans(self.cuts[path.data]), strict=True):
            gate = Gate(node, reads, channels, start)
            found.append(self._add(Op("gate", unit, node.name, (part,), self._value(node, length), gate=gate)))
        return found

    def _value(self, node: fx.Node, channels: int) -> Value:
        shape = shape_of(node)
        sizes = None if shape is None else tuple(shape[2:]) if self.dims else ()
        if not self.bounded:
            return Value(channels, range_of(node), sizes)
        bounds = bounds_of(node, self.dims)
        low, high = range_of(node)
        low, high = max(low, float(bounds.low.min())), min(high, float(bounds.high.max()))
        return Value(channels, (low, high), sizes, float(bounds.rms.square().mean().sqrt()))

    def _add(self, op: Op) -> int:
        self.ops.append(op)
        return len(self.fork) + len(self.ops) - 1

    def _channels(self, value: int) -> int:
        count = len(self.fork)
        return self.fork[value].channels if value < count else self.ops[value - count].value.channels


def spans(cuts: Sequence[int]) -> list[Span]:
    """Cut points as (first channel, number of channels)."""
    return [(first, second - first) for first, second in pairwise(cuts)]


def sum_operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Both operands, also where they are the same tensor."""
    first, second = node.args
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    return first, second


def concat_operands(node: fx.Node, dims: int) -> list[fx.Node]:
    """What is concatenated along the channels.

    Raises:
        InexactError: when it is another dimension.
    """
    operands, axis = node.args
    assert isinstance(operands, (list, tuple))
    shape = shape_of(node)
    rank = dims + 2 if dims else (len(shape) if shape is not None else 2)
    if not isinstance(axis, int) or axis % rank != (1 if dims else rank - 1):
        raise InexactError(f"{node.name} concatenates along another dimension than the channels")
    return [operand for operand in operands if isinstance(operand, fx.Node)]


def _cuts(reader: _Reader) -> dict[fx.Node, tuple[int, ...]]:
    """Where each tensor is cut: the fewest cuts such that every slice and concat falls between parts."""
    cuts = {node: {0, width} for node, width in reader.widths.items()}
    links = [link for node in reader.nodes for link in _links(reader, node)]
    changed = True
    while changed:
        changed = False
        for first, first_shift, second, second_shift, length in links:
            # channel c of the first, counted from first_shift, is channel c of the second, counted from second_shift
            for source, shift, target, other in (
                (first, first_shift, second, second_shift),
                (second, second_shift, first, first_shift),
            ):
                moved = {cut - shift + other for cut in cuts[source] if 0 <= cut - shift <= length}
                if not moved <= cuts[target]:
                    cuts[target] |= moved
                    changed = True
    return {node: tuple(sorted(found)) for node, found in cuts.items()}


def _links(reader: _Reader, node: fx.Node) -> list[tuple[fx.Node, int, fx.Node, int, int]]:
    """Which channels of which tensors are cut together."""
    width = reader.widths[node]
    if is_concat(node):
        found, start = [], 0
        for operand in concat_operands(node, reader.dims):
            found.append((operand, 0, node, start, reader.widths[operand]))
            start += reader.widths[operand]
        return found
    if node in reader.gates:
        return [(reader.gates[node].data, 0, node, 0, width)]
    if is_sum(node):
        return [(operand, 0, node, 0, width) for operand in sum_operands(node)]
    (source,) = node.all_input_nodes
    module = module_of(node)
    if isinstance(module, ChannelSlice):
        return [(source, module.start, node, 0, module.length)]
    return [(source, 0, node, 0, width)] if reader.per_channel(node) else []
