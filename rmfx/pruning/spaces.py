"""Sets of channels that stand in the same places, and what a network costs with some of them gone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from rmfx.graph.cost import positions_of
from rmfx.graph.linear import map_of, mixes
from rmfx.pruning.coupling import Coupling, is_group_wise


@dataclass(frozen=True, eq=False)
class Space:
    """Sets that stand in the very same nodes: the channels of one layer, or of layers that hang together.

    Attributes:
        name: of the first layer that makes them.
        sets: their numbers, int64.
        copies: how many channels each of them has in a node.
    """

    name: str
    sets: Tensor
    copies: Mapping[fx.Node, int]

    @property
    def width(self) -> int:
        """Channels of one set in the layer that makes it: as many as that has groups."""
        return next(iter(self.copies.values()))


def spaces_of(coupling: Coupling) -> tuple[Space, ...]:
    """All sets that may go, by where they stand, in graph order."""
    places: dict[int, list[tuple[fx.Node, int]]] = defaultdict(list)
    for node, channels in coupling.channels.items():
        for number, copies in Counter(channels.sets.tolist()).items():
            places[number].append((node, copies))
    together: dict[tuple[tuple[fx.Node, int], ...], list[int]] = defaultdict(list)
    for number, where in places.items():
        if number not in coupling.fixed:
            together[tuple(where)].append(number)
    return tuple(Space(_name(where[0][0]), torch.tensor(sets), dict(where)) for where, sets in together.items())


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


@dataclass(frozen=True, eq=False)
class _Layer:
    """MACs are ``rate * outputs * inputs``; widths are a fixed part and so many channels per set of a space."""

    rate: float
    outputs: tuple[int, Mapping[int, int]]
    inputs: tuple[int, Mapping[int, int]]


class Costs:
    """MACs per sample of a network, as a function of how many sets of each space are left.

    Args:
        coupling: of the network.
        spaces: of it.
        total: MACs per sample of the whole network, with layers that keep their channels in any case.
    """

    def __init__(self, coupling: Coupling, spaces: Sequence[Space], total: int | None = None) -> None:
        self._counts = [len(space.sets) for space in spaces]
        self._layers = [_layer(node, spaces) for node in coupling.channels if mixes(node)]
        self._near: list[list[_Layer]] = [[] for _ in spaces]
        for layer in self._layers:
            for index in {*layer.outputs[1], *layer.inputs[1]}:
                self._near[index].append(layer)
        self._rest = 0.0
        if total is not None:
            self._rest = total - self.macs()

    def neighbours(self, index: int) -> set[int]:
        """The spaces whose savings change with the width of ``index``; itself, too."""
        return {index, *(other for layer in self._near[index] for other in {*layer.outputs[1], *layer.inputs[1]})}

    def macs(self, counts: Sequence[int] | None = None) -> float:
        """Of the whole network; by default with all sets."""
        return self._rest + sum(_macs(layer, counts or self._counts) for layer in self._layers)

    def saving(self, index: int, count: int, counts: Sequence[int]) -> float:
        """MACs that go with ``count`` sets of the space ``index``, when ``counts`` are left before."""
        fewer = list(counts)
        fewer[index] -= count
        return sum(_macs(layer, counts) - _macs(layer, fewer) for layer in self._near[index])


def _macs(layer: _Layer, counts: Sequence[int]) -> float:
    ends = (layer.outputs, layer.inputs)
    outputs, inputs = (fixed + sum(c * counts[i] for i, c in parts.items()) for fixed, parts in ends)
    return layer.rate * outputs * inputs


def _layer(node: fx.Node, spaces: Sequence[Space]) -> _Layer:
    affine = map_of(node)
    rate = float(affine.grid.taps * (positions_of(node, affine.grid.dims) or 1))
    outputs = _part(node, affine.out_channels, spaces)
    if is_group_wise(node):
        return _Layer(rate, outputs, (1, {}))
    return _Layer(rate / affine.groups, outputs, _part(node.all_input_nodes[0], affine.in_channels, spaces))


def _part(node: fx.Node, width: int, spaces: Sequence[Space]) -> tuple[int, Mapping[int, int]]:
    """The channels of a node: those that stay in any case, and how many each set of a space adds."""
    parts = {index: space.copies[node] for index, space in enumerate(spaces) if node in space.copies}
    return width - sum(copies * len(spaces[index].sets) for index, copies in parts.items()), parts
