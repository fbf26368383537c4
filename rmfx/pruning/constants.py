"""What a channel emits once no weight reads into it: the constant that is left, node by node.

A set is taken out by setting to 0 every weight that leads into it: rows of convolutions, scales of norms. Shifts stay,
so it emits a constant, ``phi(b)``, which its readers can take into their own shifts. A channel that is constant as it
is, which bounds prove, is taken at its own value. ``NaN`` stands for what is no constant: at a border that is padded
with zeros, or behind what this file does not know.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.pointwise import is_pointwise
from rmfx.errors import InexactError
from rmfx.graph.bounds import bounds_of
from rmfx.graph.facts import ZERO_PADDING, is_product, is_sum, module_of, shape_of
from rmfx.graph.linear import PER_CHANNEL, affine_of, mixes
from rmfx.graph.live import live_of
from rmfx.graph.spatial import AVERAGES
from rmfx.modules import ChannelPad, ChannelSlice, FeatureNorm
from rmfx.pruning.coupling import Channels, Coupling, is_spatial_mean, parts_of

_UNKNOWN = float("nan")


def constants_of(gm: fx.GraphModule, coupling: Coupling, dropped: Tensor) -> Mapping[fx.Node, Tensor]:
    """For each node of known channels the value of those that are dropped, float64 ``[C]``; 0 for the others.

    Args:
        gm: in normal form.
        coupling: of it.
        dropped: which sets, bool ``[count]``.
    """
    found: dict[fx.Node, Tensor] = {}
    for node in gm.graph.nodes:
        channels = coupling.channels.get(node)
        if channels is None:
            continue
        gone = dropped[channels.sets]
        left = _left(node, channels.axis, found, len(gone)) if bool(gone.any()) else torch.zeros(len(gone))
        found[node] = torch.where(gone, left.double(), 0.0)
    return found


def heard(source: fx.Node, channels: Channels) -> tuple[Tensor, Tensor]:
    """What readers of ``source`` hear from its channels.

    Returns:
        Which of them say something: some output depends on them here, and they are not proven to be constant, bool
        ``[C]``. And the values of those that are constant as they are, 0 for the others, float64 ``[C]``.
    """
    shape, width = shape_of(source), len(channels.sets)
    assert shape is not None
    dims = len(shape) - 2 if channels.axis == 1 else 0
    live = live_of(source, dims).expand(width)
    bounds = bounds_of(source, dims, fully=True)
    if bounds.low.numel() not in (1, width):
        return live, torch.zeros(width, dtype=torch.float64)
    bounds = bounds.expand(width)
    return live & ~bounds.constant, torch.where(bounds.constant, bounds.low, 0.0)


def dead_sets(gm: fx.GraphModule, coupling: Coupling) -> Tensor:
    """Sets that say nothing: where they are read, nothing depends on them or they are constant; bool ``[count]``."""
    alive = torch.zeros(coupling.count, dtype=torch.bool)
    for source in {node.all_input_nodes[0]: None for node in gm.graph.nodes if mixes(node)}:
        if (channels := coupling.channels.get(source)) is not None:
            alive[channels.sets[heard(source, channels)[0]]] = True
    return coupling.free & ~alive


def _left(node: fx.Node, axis: int, found: Mapping[fx.Node, Tensor], width: int) -> Tensor:
    """What a node makes of constants."""
    unknown = torch.full((width,), _UNKNOWN, dtype=torch.float64)
    inputs = [found[source] for source in node.all_input_nodes if source in found]
    module = module_of(node)
    if module is None:
        return _of_function(node, found, unknown)
    if (layer := module if mixes(node) else scales_of(module)) is not None:
        return _shift(layer, torch.zeros_like(unknown))
    if len(inputs) != 1:
        return unknown
    [x] = inputs
    if type(module) in PER_CHANNEL:  # one factor for all, or a norm without scales
        return _scaled(node, axis, x)
    if is_pointwise(module):
        return _activated(module, axis, x, node)
    if type(module) in ZERO_PADDING or (type(module) in AVERAGES and _sees_zeros(module)):
        return torch.where(x == 0, x, unknown)
    return _moved(module, x, width)


def _scaled(node: fx.Node, axis: int, x: Tensor) -> Tensor:
    shape = shape_of(node)
    assert shape is not None
    try:
        weight, bias = affine_of(node, len(shape) - 2 if axis == 1 else 0).weights()
    except InexactError:
        return torch.full_like(x, _UNKNOWN)
    return weight.reshape(-1) * x + (0.0 if bias is None else bias)


def scales_of(module: nn.Module) -> nn.Module | None:
    """The layer that holds one scale for each channel and perhaps one shift: a norm, or a scale; else ``None``."""
    layer = module.norm if isinstance(module, FeatureNorm) else module
    weight = getattr(layer, "weight", None)
    return layer if type(layer) in PER_CHANNEL and isinstance(weight, Tensor) and weight.dim() else None


def _shift(layer: nn.Module, nothing: Tensor) -> Tensor:
    """What a layer emits with its weights at 0: its bias. (That of a norm, whose mean is subtracted before.)"""
    bias = layer.bias
    return bias.detach().double().cpu() if isinstance(bias, Tensor) else nothing


def _of_function(node: fx.Node, found: Mapping[fx.Node, Tensor], unknown: Tensor) -> Tensor:
    if is_spatial_mean(node):
        return found[node.all_input_nodes[0]]
    if node.target is torch.cat:
        parts = [found[part] for part in parts_of(node)]
        return torch.cat(parts) if sum(map(len, parts)) == len(unknown) else unknown
    operands = [found.get(arg) for arg in node.args if isinstance(arg, fx.Node)]  # numbers are layers
    terms = [x for x in operands if x is not None and x.shape in (torch.Size(), unknown.shape)]
    if len(terms) != 2:  # one operand is no channels, or is spread over all of them
        return torch.where(terms[0] == 0, 0.0, unknown) if terms and is_product(node) else unknown
    return terms[0] + terms[1] if is_sum(node) else terms[0] * terms[1]


def _activated(module: nn.Module, axis: int, x: Tensor, node: fx.Node) -> Tensor:
    shape = shape_of(node)
    assert shape is not None
    sizes = [1] * len(shape)
    sizes[axis] = len(x)
    with torch.no_grad():
        return copy.deepcopy(module).double().cpu()(x.reshape(sizes).clone()).reshape(-1)


def _sees_zeros(module: nn.Module) -> bool:
    padding = module.padding if isinstance(module.padding, tuple) else (module.padding,)
    counted = any(padding) and bool(module.count_include_pad)
    return counted or getattr(module, "divisor_override", None) is not None


def _moved(module: nn.Module, x: Tensor, width: int) -> Tensor:
    if isinstance(module, ChannelSlice) and len(x) != width:
        return x[module.start : module.start + module.length]
    if isinstance(module, ChannelPad) and len(x) != width:
        return nn.functional.pad(x, (module.before, module.after))
    if isinstance(module, nn.ChannelShuffle):
        return x.reshape(int(module.groups), -1).t().reshape(-1)
    return x.repeat_interleave(width // len(x))  # a flattened image; other layers keep channels as they are
