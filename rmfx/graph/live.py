"""Which channels of a node's value anything depends on: the others are dead, whatever they hold."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.pointwise import is_pointwise
from rmfx.algebra.rows import columns_read
from rmfx.errors import InexactError
from rmfx.graph.bounds import is_map, is_plain_flatten, keeps_channels
from rmfx.graph.facts import ZERO_PADDING, channels_of, is_product, is_sum, module_of, shape_of
from rmfx.graph.linear import affine_of, dims_of
from rmfx.graph.spatial import AVERAGES
from rmfx.graph.walk import Place, known, on_demand
from rmfx.modules import ChannelPad, ChannelSlice

_FACT = "live_channels"
ALL = torch.tensor(True)


def live_of(node: fx.Node, dims: int) -> Tensor:
    """Which channels some output of the network depends on, bool ``[C]``, or ``[]`` where all do.

    A weight of 0 reads nothing. Reads weights, and is computed on demand.

    Args:
        node: of a graph in normal form.
        dims: spatial dimensions of the layers it stands among: channels are dimension 1, or the last one for 0.
    """
    return on_demand((node, dims), _FACT, _needs, _live)


def _needs(place: Place) -> list[Place]:
    node, dims = place
    return [(reader, after) for reader in node.users if (after := _dims_behind(reader, dims)) is not None]


def _dims_behind(reader: fx.Node, dims: int) -> int | None:
    """Among how many dimensions the reader's channels are meant; ``None`` where it may depend on all channels."""
    module = module_of(reader)
    if module is None:
        return dims if is_sum(reader) or is_product(reader) else None
    if len(reader.all_input_nodes) != 1:
        return None
    if is_map(reader):
        return dims if dims_of(reader) in (None, dims) else None
    if isinstance(module, nn.Flatten):
        return 0 if dims and is_plain_flatten(reader) else None
    if isinstance(module, (ChannelSlice, ChannelPad)):
        return dims if module.axis == (1 if dims else -1) else None
    known_layer = is_pointwise(module) or keeps_channels(module) or isinstance(module, ZERO_PADDING)
    return dims if known_layer else None


def _live(place: Place) -> Tensor:
    node, dims = place
    total = torch.tensor(False)
    for reader in node.users:
        after = _dims_behind(reader, dims)
        total = total | (ALL if after is None else _read_by(reader, node, dims, known((reader, after), _FACT)))
    return total


def _read_by(reader: fx.Node, node: fx.Node, dims: int, live: Tensor) -> Tensor:
    """The channels of ``node`` that the ``live`` channels of ``reader`` depend on."""
    module = module_of(reader)
    if module is None:
        return live if _alike(reader, dims) else ALL
    if is_map(reader):
        return _read_by_map(reader, dims, live)
    if isinstance(module, (ChannelSlice, ChannelPad)):
        return _read_by_move(module, channels_of(node, dims), live)
    return live


def _alike(reader: fx.Node, dims: int) -> bool:
    """Whether all operands have the channels of the result (nothing broadcasts along them)."""
    found = [shape_of(other) for other in (reader, *reader.all_input_nodes)]
    axis, shapes = 1 if dims else -1, [shape for shape in found if shape is not None]
    if len(shapes) < len(found) or any(len(shape) < 1 + bool(dims) for shape in shapes):
        return False
    return len({(len(shape), shape[axis]) for shape in shapes}) == 1


def _read_by_map(reader: fx.Node, dims: int, live: Tensor) -> Tensor:
    try:
        affine = affine_of(reader, dims)
        return columns_read(affine, live.expand(affine.out_channels))
    except InexactError:
        return live if isinstance(module_of(reader), AVERAGES) else ALL


def _read_by_move(module: ChannelSlice | ChannelPad, channels: int | None, live: Tensor) -> Tensor:
    if channels is None:
        return ALL
    if isinstance(module, ChannelPad):
        return live if not live.dim() else live[module.before : module.before + channels]
    read = torch.zeros(channels, dtype=torch.bool)
    read[module.start : module.start + module.length] = live
    return read
