"""What is known of each node before anything is rewritten: shape, value range, channels, readers.

Facts live in ``node.meta`` under ``"shape"`` (``torch.Size``, only where example inputs were given) and
``"range"`` (an interval that holds every element). :class:`rmfx.graph.editor.Editor` keeps them up to date for the
nodes it makes, so each is computed once.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from rmfx.algebra.pointwise import EVERYTHING, Range, image, is_pointwise
from rmfx.front.shapes import propagate
from rmfx.modules import DROPOUTS, ChannelAffine, ChannelPad, ChannelsLast, ChannelSlice, SizeGuard

# Layers whose outputs are convex combinations of inputs of the same channel.
KEEPING_CHANNELS = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReflectionPad3d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
    nn.CircularPad1d,
    nn.CircularPad2d,
    nn.CircularPad3d,
    SizeGuard,
    ChannelsLast,
    *DROPOUTS,
)
_MOVING = (nn.Flatten, nn.Unflatten, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle, ChannelSlice)
_KEEPING = (*KEEPING_CHANNELS, *_MOVING)
ZERO_PADDING = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_KEEPING_WITH_ZERO = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, *ZERO_PADDING, ChannelPad)


GIVEN_RANGE = "given_range"  # node.meta: an interval that the user knows of a value


def annotate(gm: fx.GraphModule, example_inputs: tuple[Any, ...] | None) -> None:
    """Fill ``"range"`` of every node, given inputs also ``"shape"`` and ``"dtype"``; runs nothing for real."""
    if example_inputs is not None:
        propagate(gm, example_inputs)
    for node in gm.graph.nodes:
        low, high = _range(gm, node)
        given = node.meta.get(GIVEN_RANGE, EVERYTHING)
        node.meta["range"] = max(low, given[0]), min(high, given[1])


def shape_of(node: fx.Node) -> torch.Size | None:
    """The node's shape for the example inputs, or ``None`` where none were given or it is no tensor."""
    return node.meta.get("shape")


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The type of the node's elements for the example inputs, or ``None`` where none were given or it is no tensor."""
    return node.meta.get("dtype")


def rank_of(node: fx.Node) -> int | None:
    """Number of dimensions of the node's value, or ``None`` where neither example inputs nor layers tell."""
    shape = shape_of(node)
    return node.meta.get("rank") if shape is None else len(shape)


def range_of(node: fx.Node) -> Range:
    """An interval that holds every element of the node's value."""
    return node.meta.get("range", EVERYTHING)


def module_of(node: fx.Node) -> nn.Module | None:
    """The module that a ``call_module`` node calls, else ``None``."""
    if node.op != "call_module":
        return None
    module: nn.Module | None = node.graph.owning_module
    for part in str(node.target).split("."):  # asked for very often: get_submodule checks each step twice
        assert module is not None
        module = module._modules[part]
    return module


def called(node: fx.Node) -> nn.Module:
    """The module that ``node`` calls, where it is known to call one."""
    module = module_of(node)
    assert module is not None
    return module


def is_sum(node: fx.Node) -> bool:
    """Whether the node is a sum of two tensors in normal form (sizes may be added up too)."""
    return node.op == "call_function" and node.target is operator.add and not node.meta.get("plain_value", False)


def is_product(node: fx.Node) -> bool:
    """Whether the node is a product of two tensors in normal form (sizes may be multiplied too)."""
    return node.op == "call_function" and node.target is operator.mul and not is_plain(node)


def is_plain(node: fx.Node) -> bool:
    """Whether the node's value is surely no tensor: a size, or arithmetic on sizes."""
    return bool(node.meta.get("plain_value", False))


def values_read(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values ``node`` reads: of ``mask.type_as(x)`` not ``x``."""
    casts = node.op == "call_method" and node.target == "type_as"
    return node.all_input_nodes[:1] if casts else node.all_input_nodes


def is_dropout(node: fx.Node) -> bool:
    """Whether the node calls a dropout layer (there are some in networks that will train only)."""
    return isinstance(module_of(node), DROPOUTS)


def channels_of(node: fx.Node, dims: int) -> int | None:
    """Channels of the node's value (last axis for 0 spatial ``dims``), or ``None`` where nothing tells."""
    shape = shape_of(node)
    if shape is not None and len(shape) >= 2:
        return shape[1] if dims else shape[-1]
    if is_sum(node):
        return _channels_of_sum(node, dims)
    module = module_of(node)
    if isinstance(module, ChannelSlice):
        return module.length if module.axis == (1 if dims else -1) else None
    if isinstance(module, nn.Linear) and dims:
        return None  # it acts on the last axis
    width = getattr(module, "out_channels" if dims else "out_features", None) or getattr(module, "num_features", None)
    if isinstance(width, int):
        return width
    keeps = module is not None and (is_pointwise(module) or isinstance(module, _PER_CHANNEL))
    channels = channels_of(node.all_input_nodes[0], dims) if keeps and node.all_input_nodes else None
    return channels + module.before + module.after if channels and isinstance(module, ChannelPad) else channels


def _channels_of_sum(node: fx.Node, dims: int) -> int | None:
    """A sum may broadcast: one channel tells nothing while the other operand's are unknown."""
    found = []
    for operand in sorted(node.all_input_nodes, reverse=True):  # the later one tends to tell without a long walk
        channels = channels_of(operand, dims)
        if channels is not None and channels > 1:
            return channels
        found.append(channels)
    return 1 if found == [1] * len(found) else None


_RESHAPING = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle)
_PER_CHANNEL = (ChannelAffine, *(set(_KEEPING) - set(_RESHAPING)), *_KEEPING_WITH_ZERO)


def _range(gm: fx.GraphModule, node: fx.Node) -> Range:
    if is_sum(node):
        first, second = (range_of(arg) if isinstance(arg, fx.Node) else EVERYTHING for arg in node.args)
        return first[0] + second[0], first[1] + second[1]
    if is_product(node):
        first, second = (range_of(arg) if isinstance(arg, fx.Node) else EVERYTHING for arg in node.args)
        return _product(first, second)
    if node.target is torch.cat:
        ranges = [range_of(parent) for parent in node.all_input_nodes]
        return min(low for low, _ in ranges), max(high for _, high in ranges)
    if node.op == "call_module" and len(node.all_input_nodes) == 1:
        return module_range(gm.get_submodule(str(node.target)), range_of(node.all_input_nodes[0]))
    return EVERYTHING


def _product(first: Range, second: Range) -> Range:
    """All products of two intervals; zero times an infinite end is zero, since values are finite."""
    ends = [a * b if a and b else 0.0 for a in first for b in second]
    return min(ends), max(ends)


def module_range(module: nn.Module, values: Range) -> Range:
    """An interval that holds ``module(x)`` for ``x`` within ``values``."""
    low, high = values
    if is_pointwise(module):
        return image(module, values)
    if isinstance(module, _KEEPING) or (isinstance(module, nn.Upsample) and module.mode != "bicubic"):
        return values
    if isinstance(module, nn.ConstantPad1d | nn.ConstantPad2d | nn.ConstantPad3d):
        return min(low, module.value), max(high, module.value)
    if isinstance(module, _KEEPING_WITH_ZERO) and getattr(module, "divisor_override", None) is None:
        return min(low, 0.0), max(high, 0.0)
    if isinstance(module, ChannelAffine) and _is_plain_factor(module):
        factor = float(module.weight.detach())
        ends = sorted((low * factor, high * factor)) if factor else [0.0, 0.0]
        return ends[0], ends[1]
    return EVERYTHING


def _is_plain_factor(module: ChannelAffine) -> bool:
    return module.weight.dim() == 0 and module.bias is None and not module.weight.is_meta
