"""Who reads sizes of tensors that go with a region, and which tensor of the plain sequence has the same ones.

Two tensors have equal sizes at every input where the layers between the fork and each change sizes alike: a run of
linear layers by one stride and one excess (:mod:`rmfx.algebra.grid`), a pool by being that pool.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import fx, nn

from rmfx.algebra.affine import Affine
from rmfx.algebra.grid import Grid
from rmfx.errors import InexactError
from rmfx.graph.facts import is_plain, rank_of
from rmfx.graph.linear import affine_of, is_linear, mixes
from rmfx.graph.region import Region
from rmfx.graph.spatial import is_spatial, spatial_grid
from rmfx.graph.stages import STAGES
from rmfx.layout.problem import NewGate, NewLayer

Sizing = tuple[object, ...]  # what changed the sizes since the fork
_KINDS = frozenset({"dim", "ndim", "dtype", "device"})  # read off a tensor, the same on all of a region


@dataclass(frozen=True)
class Handed:
    """A read of sizes, and the new layer it reads them of instead (-1: the fork)."""

    reader: fx.Node
    source: fx.Node
    layer: int


def hand_over(region: Region, layers: Sequence[NewLayer | NewGate], dims: int) -> tuple[Handed, ...]:
    """Where every read of sizes inside ``region`` goes.

    Raises:
        InexactError: when no tensor of the new sequence has these sizes at every input, or channels are read.
    """
    beside = {node for gate in region.gates for node in gate.side}
    reads = [(node, r) for node in region.nodes for r in node.users if is_plain(r) and r not in beside]
    if not reads:
        return ()
    old, new = _inside(region, dims), _along(layers)
    found = []
    for node, reader in reads:
        if (positions := _reads_positions(reader, rank_of(node) or (dims + 2 if dims else None), dims)) is None:
            raise InexactError(f"{reader.name} reads the number of channels of {node.name}, which goes")
        if positions and old[node] not in new:
            raise InexactError(f"{reader.name} reads sizes of {node.name}, which no tensor of the plain network has")
        found.append(Handed(reader, node, new.index(old[node]) - 1 if positions else -1))
    _check_gates(region, layers, {handed.reader: handed.layer for handed in found})
    return tuple(found)


def _check_gates(region: Region, layers: Sequence[NewLayer | NewGate], handed: dict[fx.Node, int]) -> None:
    """A size that a gate is computed with must be known when it is."""
    index = {layer.key: i for i, layer in enumerate(layers) if isinstance(layer, NewGate)}
    for gate in region.gates:
        todo = [source for node in gate.side for source in node.all_input_nodes if is_plain(source)]
        while todo:
            node = todo.pop()
            if handed.get(node, -1) >= index[gate.node]:
                raise InexactError(f"{gate.node.name} is computed with sizes that are known behind it only")
            todo += [source for source in node.all_input_nodes if is_plain(source)]


def _inside(region: Region, dims: int) -> dict[fx.Node, Sizing]:
    """What changes the sizes between the fork and each node."""
    found: dict[fx.Node, Sizing] = {region.fork: ()}
    gates = {gate.node: gate.data for gate in region.gates}
    for node in region.nodes:
        before = found[gates.get(node, node.all_input_nodes[0])]
        module: Any = node.graph.owning_module.get_submodule(str(node.target)) if node.op == "call_module" else None  # type: ignore[union-attr]
        if is_linear(node):
            found[node] = _then(before, _grid_of(node, dims))
        else:
            found[node] = (*before, repr(module)) if type(module) in STAGES else before
    return found


def _grid_of(node: fx.Node, dims: int) -> Grid:
    if "affine" in node.meta or mixes(node):
        return affine_of(node, dims).grid
    return spatial_grid(node, dims)[0] if is_spatial(node) else Grid.sampling([1] * dims)


def _along(layers: Sequence[NewLayer | NewGate]) -> list[Sizing]:
    """What changes the sizes between the fork and it, for the fork and each new layer."""
    found: list[Sizing] = [()]
    for layer in layers:
        made = None if isinstance(layer, NewGate) else layer.map
        if isinstance(made, Affine):
            found.append(_then(found[-1], made.grid))
        else:
            found.append(
                (*found[-1], repr(made)) if isinstance(made, nn.Module) and type(made) in STAGES else found[-1]
            )
    return found


def _then(before: Sizing, grid: Grid) -> Sizing:
    """``floor((n + e - 1) / s) + 1`` behind what stood before; two of these in a row are one."""
    own = tuple((axis.stride, axis.excess) for axis in grid.axes)
    if before and isinstance(before[-1], tuple):
        own = tuple((s * t, d + s * e) for (s, d), (t, e) in zip(before[-1], own, strict=True))
        before = before[:-1]
    return before if all(axis == (1, 0) for axis in own) else (*before, own)


def _reads_positions(reader: fx.Node, rank: int | None, dims: int) -> bool | None:
    """Whether sizes other than that of the batch are read; ``None`` where channels may be among them."""
    axes = list(_axes(reader))
    channels = {1, None if rank is None else 1 - rank} if dims else {-1, None if rank is None else rank - 1}
    for axis in axes:
        if axis is None or axis in channels or (rank is None and axis != 0):
            return None
    return any(axis != 0 for axis in axes)


def _axes(reader: fx.Node) -> Iterator[int | None]:
    """The dimensions that are read; ``None`` where any may be."""
    name = reader.target if reader.op == "call_method" else reader.args[1]
    if name in _KINDS:
        return
    if name == "size" and (len(reader.args) > 1 or "dim" in reader.kwargs):
        axis = reader.args[1] if len(reader.args) > 1 else reader.kwargs["dim"]
        yield axis if type(axis) is int else None
    elif name in ("shape", "size"):
        for user in reader.users:
            yield from _picked(user, reader)
    else:
        yield None


def _picked(user: fx.Node, shape: fx.Node) -> Iterator[int | None]:
    """Which dimensions ``shape[...]`` picks."""
    key = user.args[1] if user.target is operator.getitem and user.args[0] is shape else None
    if type(key) is int:
        yield key
    elif isinstance(key, slice) and all(bound is None or type(bound) is int for bound in (key.start, key.stop)):
        if key.step is None and key.stop is None and key.start is not None:  # all from there on, from either end
            yield from range(key.start, 0) if key.start < 0 else range(key.start, 8)
        else:
            yield None
    else:
        yield None


def put_in_order(graph: fx.Graph) -> None:
    """Move every node behind all that it reads, none that stands there already."""
    order: dict[fx.Node, None] = {}
    for wanted in list(graph.nodes):
        todo = [wanted]
        while todo:
            missing = [source for source in todo[-1].all_input_nodes if source not in order]
            if missing and todo[-1] not in order:
                todo += missing
            else:
                order[todo.pop()] = None
    for node, following in pairwise(list(order)):
        if node.next is not following:
            node.append(following)
