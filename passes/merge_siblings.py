"""Convolutions that read the same tensor alike become one wider convolution, and a slice for each reader.

        +-- L1 -- y1                              +-- slice -- y1
    x --+                  becomes     x -- L --+
        +-- L2 -- y2                              +-- slice -- y2

    L = [L1; L2]

The arithmetic stays the same; there are fewer and larger kernels, and slices, which some runtimes copy. So this pass is
for plans only: whether it pays depends on the target.

Conditions:

1. the layers read one tensor, and have one tap grid and padding mode, and no groups;
2. no sum follows one of them at once: runtimes compute a convolution and the sum behind it together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import fx

from rmfx.algebra.affine import Affine
from rmfx.algebra.stacking import Block, stack
from rmfx.errors import InexactError
from rmfx.graph.cost import cost_of
from rmfx.graph.facts import is_sum
from rmfx.graph.linear import affine_of, dims_of, mixes
from rmfx.graph.rule import Price, Refusal, Rule
from rmfx.modules import ChannelSlice

if TYPE_CHECKING:
    from rmfx.graph.editor import Editor


@dataclass(frozen=True, eq=False)
class MergeSiblingsPlan:
    """The layers, in graph order, and the map of all of them side by side."""

    layers: tuple[fx.Node, ...]
    maps: tuple[Affine, ...]
    map: Affine


@dataclass(frozen=True)
class MergeSiblings(Rule[tuple[fx.Node, ...], MergeSiblingsPlan]):
    """One convolution for all that read a tensor alike."""

    name: ClassVar[str] = "merge_siblings"

    def match(self, node: fx.Node) -> tuple[fx.Node, ...] | None:
        if not mixes(node):
            return None
        readers = sorted(reader for reader in node.all_input_nodes[0].users if mixes(reader))
        alike = tuple(reader for reader in readers if _looks_like(reader, node))
        if len(alike) < 2 or alike[-1] is not node or any(is_sum(user) for reader in alike for user in reader.users):
            return None
        return alike

    def check(self, match: tuple[fx.Node, ...]) -> MergeSiblingsPlan | Refusal:
        dims = dims_of(match[-1])
        assert dims is not None
        try:
            maps = tuple(affine_of(node, dims) for node in match)
            return MergeSiblingsPlan(match, maps, _side_by_side(maps))
        except InexactError as error:
            return Refusal(match[-1], str(error))

    def price(self, plan: MergeSiblingsPlan) -> Price:
        macs, params = cost_of(plan.layers, plan.map.grid.dims)
        return Price(macs, macs, params, plan.map.parameters)

    def scope(self, plan: MergeSiblingsPlan) -> tuple[fx.Node, ...]:
        return plan.layers

    def rewrite(self, plan: MergeSiblingsPlan, editor: Editor) -> fx.Node:
        first, dims = plan.layers[0], plan.map.grid.dims
        place = first.meta.get("place", "")
        wide = editor.linear(plan.map, first.all_input_nodes[0], first, editor.fresh(place, "siblings"))
        start, part = 0, wide
        for layer, own in zip(plan.layers, plan.maps, strict=True):
            slice_ = ChannelSlice(start, own.out_channels, 1 if dims else -1)
            part = editor.layer(slice_, wide, first, editor.fresh(place, "part"))
            editor.replace(layer, part)
            start += own.out_channels
        editor.erase(plan.layers)
        return part


def _looks_like(node: fx.Node, other: fx.Node) -> bool:
    """Condition 1, from the layers; their weights may not be computed yet."""
    dims = dims_of(node)
    if dims is None or dims != dims_of(other):
        return False
    try:
        mine, theirs = affine_of(node, dims), affine_of(other, dims)
    except InexactError:
        return False
    return mine.grid == theirs.grid and mine.groups == theirs.groups == 1


def _side_by_side(maps: tuple[Affine, ...]) -> Affine:
    blocks, start = [], 0
    for own in maps:
        rows = torch.arange(start, start + own.out_channels)
        blocks.append(Block(own, rows, torch.arange(own.in_channels)))
        start += own.out_channels
    return stack(blocks, maps[0].in_channels, start, 1)
