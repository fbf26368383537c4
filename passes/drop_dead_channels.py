"""Channels that say nothing disappear: what is never read, and what is constant (channel-exactness).

    x -> L1 -> phi -> L2 -> y        becomes        x -> L1' -> phi' -> L2' -> y        with fewer channels between

where ``phi`` is a chain of activations, norms, pools and depthwise convolutions. With ``a_c`` the value of channel
``c`` in front of ``L2`` and ``W_c`` the weights that read it,

    y = sum_c W_c a_c + b = sum_kept W_c a_c + (sum_constant W_c v_c) + b.

The constants go into the bias ``b``, or, at a zero-padded border, where a bias would be too much, all into one
constant channel ``d`` that stays: ``W_d' = sum_c W_c v_c / v_d``.

Conditions:

1. ``L1`` and ``L2`` are convolutions or linear layers; every layer from ``L1`` to ``L2`` acts on each channel by
   itself and has one reader;
2. a dropped channel is dead (every weight that reads it is 0, but for weights of dead channels), or constant: proven
   by bounds from the weights (zero rows, scales of 0, activations that are flat on all their inputs), see
   :mod:`rmfx.graph.bounds`;
3. a constant is 0, or ``L2`` pads no zeros, or another constant channel of the same group stays;
4. groups of ``L1`` and of ``L2`` stay equally wide, so each loses as many channels as the one that can lose fewest;
5. one channel of each stays.

Dead channels need one sweep. A channel may be seen to be dead only when a constant one behind it has gone: sweep
until nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.affine import Affine
from rmfx.algebra.bounds import padding_taps
from rmfx.algebra.pointwise import is_pointwise
from rmfx.algebra.select import select_groups, select_inputs, select_outputs
from rmfx.errors import InexactError
from rmfx.graph.bounds import (
    ZERO_PADDING,
    acts_on_channels,
    bounds_of,
    dims_before,
    is_plain_flatten,
    keeps_channels,
)
from rmfx.graph.cost import layer_parameters, positions_of
from rmfx.graph.facts import module_of, shape_of
from rmfx.graph.linear import PER_CHANNEL, affine_of, dims_of, map_of, mixes
from rmfx.graph.live import live_of
from rmfx.graph.rule import Price, Refusal, Rule
from rmfx.graph.spatial import AVERAGES
from rmfx.layout.narrowing import narrowed
from rmfx.modules import DROPOUTS

if TYPE_CHECKING:
    from rmfx.graph.editor import Editor


@dataclass(frozen=True, eq=False)
class DropDeadChannelsMatch:
    """Two layers that mix channels, what stands between them, and the channels in between that may go.

    Attributes:
        droppable: which channels satisfy conditions 2 and 3, bool ``[C]``.
        constants: the value of each constant channel in front of ``last``, 0 for the others.
    """

    first: fx.Node
    stages: tuple[fx.Node, ...]
    last: fx.Node
    droppable: Tensor
    constants: Tensor


@dataclass(frozen=True, eq=False)
class DropDeadChannelsPlan:
    """The same layers on the channels ``kept``."""

    match: DropDeadChannelsMatch
    kept: Tensor
    first: Affine
    stages: tuple[Affine | nn.Module, ...]
    last: Affine
    price: Price


@dataclass(frozen=True)
class DropDeadChannels(Rule[DropDeadChannelsMatch, DropDeadChannelsPlan]):
    """Remove dead and constant channels between two layers; reads weights, in float64."""

    name: ClassVar[str] = "drop_dead_channels"

    def match(self, node: fx.Node) -> DropDeadChannelsMatch | None:
        if not _is_mixing(node):
            return None
        stages: list[fx.Node] = []
        tip, dims = node.all_input_nodes[0], map_of(node).grid.dims
        while len(tip.users) == 1 and _is_stage(tip, dims):
            stages.insert(0, tip)
            tip, dims = tip.all_input_nodes[0], dims_before(tip, dims)
        if len(tip.users) != 1 or not _is_mixing(tip) or dims_of(tip) != dims:
            return None
        droppable, constants = _droppable(node, map_of(tip))
        return DropDeadChannelsMatch(tip, tuple(stages), node, droppable, constants) if bool(droppable.any()) else None

    def check(self, match: DropDeadChannelsMatch) -> DropDeadChannelsPlan | Refusal:
        first, last = map_of(match.first), map_of(match.last)
        kept = _kept(match.droppable, lcm(first.groups, last.groups))
        if kept is None:
            count = int(match.droppable.sum())
            return Refusal(
                match.last,
                f"{count} channels in front of {match.last.name} are dead or constant, but its groups, or those of "
                f"{match.first.name}, must stay equally wide and not empty",
            )
        try:
            stages = tuple(_restricted(node, kept, first.grid.dims) for node in match.stages)
            narrow = select_outputs(first, kept), stages, select_inputs(last, kept, match.constants)
        except InexactError as error:
            return Refusal(match.last, str(error))
        return DropDeadChannelsPlan(match, kept, *narrow, _price(match, *narrow))

    def price(self, plan: DropDeadChannelsPlan) -> Price:
        return plan.price

    def scope(self, plan: DropDeadChannelsPlan) -> tuple[fx.Node, ...]:
        return plan.match.first, *plan.match.stages, plan.match.last

    def rewrite(self, plan: DropDeadChannelsPlan, editor: Editor) -> fx.Node:
        match = plan.match
        old = (match.first, *match.stages, match.last)
        node, dims = match.first.all_input_nodes[0], plan.first.grid.dims
        for place, layer in zip(old, (plan.first, *plan.stages, plan.last), strict=True):
            name = str(place.target)
            if isinstance(layer, Affine):
                node = editor.linear(layer, node, match.last, name)
            else:
                node = editor.layer(layer, node, match.last, name)
            dims = 0 if isinstance(layer, nn.Flatten) else dims
            _describe(node, place, len(plan.kept), dims)
        editor.replace(match.last, node)
        editor.erase(reversed(old))
        return node


def _is_mixing(node: fx.Node) -> bool:
    return mixes(node) and len(node.all_input_nodes) == 1 and not _is_depthwise(node)


def _is_depthwise(node: fx.Node) -> bool:
    module = module_of(node)
    groups = getattr(module, "groups", 1)
    return groups > 1 and groups == getattr(module, "in_channels", 0) == getattr(module, "out_channels", 0)


def _is_stage(node: fx.Node, dims: int) -> bool:
    """Condition 1, for the channels meant among ``dims`` spatial dimensions."""
    module = module_of(node)
    if module is None or len(node.all_input_nodes) != 1:
        return False
    if is_pointwise(module):
        return acts_on_channels(module, dims)
    if keeps_channels(module) or type(module) in (*AVERAGES, *ZERO_PADDING):
        return dims > 0 or isinstance(module, DROPOUTS)
    if _is_depthwise(node) or is_plain_flatten(node):
        return (dims == 0) == is_plain_flatten(node)
    return type(module) in PER_CHANNEL and _is_map(node, dims)


def _is_map(node: fx.Node, dims: int) -> bool:
    try:
        return affine_of(node, dims).grid.dims == dims
    except InexactError:  # of another axis, or without statistics
        return False


def _droppable(last: fx.Node, first: Affine) -> tuple[Tensor, Tensor]:
    """Conditions 2 and 3: which channels may go, and the values of those that are constant."""
    affine, channels = map_of(last), first.out_channels
    source, dims = last.all_input_nodes[0], affine.grid.dims
    bounds, live = bounds_of(source, dims, fully=True), live_of(source, dims)
    if {bounds.low.numel(), live.numel()} - {1, channels}:
        return torch.zeros(channels, dtype=torch.bool), torch.zeros(channels)  # another axis than the channels
    bounds, live = bounds.expand(channels), live.expand(channels)
    constants = torch.where(bounds.constant, bounds.low, 0.0)
    stay = torch.zeros(channels, dtype=torch.bool)
    if bool(padding_taps(affine.grid).any()):
        sizes = torch.where(live, constants.abs(), 0.0).reshape(affine.groups, -1)
        largest, home = sizes.max(1)
        stay[(home + torch.arange(affine.groups) * sizes.shape[1])[largest > 0]] = True
    if first.groups == affine.groups == 1 and bool((~live | bounds.constant | stay).all()) and not bool(stay.any()):
        stay[-1] = True  # condition 5
    return (~live | bounds.constant) & ~stay, torch.where(live, constants, 0.0)


def _kept(droppable: Tensor, groups: int) -> Tensor | None:
    """Conditions 4 and 5: the channels to keep, or ``None`` where none can go."""
    blocks = droppable.reshape(groups, -1)
    count = min(int(blocks.sum(1).min()), blocks.shape[1] - 1)
    if count == 0:
        return None
    dropped = blocks & (blocks.cumsum(1) <= count)
    return (~dropped).reshape(-1).nonzero().flatten()


def _restricted(node: fx.Node, kept: Tensor, dims: int) -> Affine | nn.Module:
    """The layer of ``node`` on the channels ``kept``."""
    if _is_depthwise(node):
        return select_groups(affine_of(node, dims), kept)
    module = module_of(node)
    assert module is not None
    return narrowed(module, kept)


def _price(match: DropDeadChannelsMatch, first: Affine, stages: tuple[Affine | nn.Module, ...], last: Affine) -> Price:
    old = (match.first, *match.stages, match.last)
    macs = [0.0, 0.0]
    parameters = [sum(layer_parameters(node) for node in old), 0]
    density = 1.0
    for node, new in zip(old, (first, *stages, last), strict=True):
        if not isinstance(new, Affine):
            parameters[1] += sum(p.numel() for p in new.parameters())
            continue
        for stride in new.grid.stride:
            density /= stride
        positions = positions_of(node, new.grid.dims) or density
        before = affine_of(node, new.grid.dims)
        macs[0] += before.macs_per_position * positions
        macs[1] += new.macs_per_position * positions
        parameters[1] += new.parameters
    return Price(macs[0], macs[1], parameters[0], parameters[1])


def _describe(node: fx.Node, old: fx.Node, channels: int, dims: int) -> None:
    """What is known of ``old`` holds for those of its channels that ``node`` computes."""
    for key in ("origin", "range", "rank"):
        if key in old.meta:
            node.meta[key] = old.meta[key]
    if (shape := shape_of(old)) is not None:
        axis = 1 if dims else len(shape) - 1
        node.meta["shape"] = torch.Size([*shape[:axis], channels, *shape[axis + 1 :]])
