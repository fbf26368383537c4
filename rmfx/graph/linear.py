"""Reads the linear maps of the algebra off the layers of a graph in normal form."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from rmfx.algebra import kernels
from rmfx.algebra.affine import Affine, from_tensors, per_channel, selection
from rmfx.algebra.exact import on_cpu
from rmfx.algebra.grid import Axis, Grid
from rmfx.algebra.pointwise import NORMS
from rmfx.errors import InexactError
from rmfx.graph.facts import channels_of, is_sum, module_of, shape_of
from rmfx.graph.spatial import AVERAGES, FAMILIES, is_spatial, spatial_map
from rmfx.graph.spatial import size_dependent as size_dependent
from rmfx.modules import ChannelAffine, ChannelPad, ChannelSlice, FeatureNorm

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MIXING = (*CONVS, nn.Linear)  # layers that mix channels
PER_CHANNEL = (*NORMS, FeatureNorm, ChannelAffine)  # layers that scale and shift each channel
SELECTING = (ChannelSlice, ChannelPad, nn.ChannelShuffle)  # layers that pick, add and move channels
LINEAR = (*MIXING, *PER_CHANNEL, *SELECTING, *AVERAGES)


def is_linear(node: fx.Node) -> bool:
    """Whether the node calls a layer that may be a linear map (:func:`affine_of` decides)."""
    return type(module_of(node)) in LINEAR or is_spatial(node)


def mixes(node: fx.Node) -> bool:
    """Whether the node calls a convolution or a linear layer."""
    return type(module_of(node)) in MIXING


def is_term_factor(node: fx.Node) -> bool:
    """Whether the node is the factor of a term of a sum: ``x - y`` is ``x + (-1) * y``, and may have to stay that."""
    module = module_of(node)
    scalar = isinstance(module, ChannelAffine) and module.weight.dim() == 0 and module.bias is None
    return scalar and any(is_sum(user) for user in node.users)


def dims_of(node: fx.Node) -> int | None:
    """Spatial dimensions of a linear layer: 0 for Linear, 1 to 3 for ConvNd; ``None`` where it does not tell."""
    module = module_of(node)
    if isinstance(module, nn.Linear | FeatureNorm):
        return 0
    if isinstance(module, nn.PixelUnshuffle):
        return 2
    for family in (CONVS, NORMS, *FAMILIES):
        if type(module) in family and type(module) is not nn.BatchNorm1d:
            return family.index(type(module)) + 1
    shape = shape_of(node)
    if shape is None:
        return None
    if isinstance(module, SELECTING):
        return 0 if getattr(module, "axis", 1) == -1 else len(shape) - 2
    return 1 if type(module) is nn.BatchNorm1d and len(shape) == 3 else None


def affine_of(node: fx.Node, dims: int, channels: int | None = None) -> Affine:
    """The linear map that ``node`` applies to its input, among layers of ``dims`` spatial dimensions.

    Args:
        channels: of the input, where the caller knows it and the graph may not.

    Raises:
        InexactError: when the layer is not a fixed linear map per position, saying why.
    """
    if "affine" in node.meta:  # a layer that a pass has made: its weights are not computed yet
        return node.meta["affine"]
    module = module_of(node)
    own = dims_of(node)
    if own is not None and own != dims and not isinstance(module, nn.BatchNorm1d):
        raise InexactError(f"{node.name} has {own} spatial dimensions among layers of {dims}")
    if isinstance(module, CONVS):
        return _conv(node, module)
    if isinstance(module, nn.Linear):
        return from_tensors(module.weight, module.bias, Grid(), sources=_sources(node, module))
    if isinstance(module, FeatureNorm):
        return _scaled_shifted(module.norm, 0, _sources(node, module))
    if isinstance(module, NORMS):
        return _norm(node, module, dims)
    if isinstance(module, ChannelAffine):
        return _channel_affine(node, module, dims, channels)
    if isinstance(module, SELECTING):
        return _selection(node, module, dims, channels)
    if is_spatial(node):
        return spatial_map(node, dims, _in_channels(node, dims, channels))
    raise InexactError(f"{node.name} is not a linear layer")


def map_of(node: fx.Node) -> Affine:
    """The linear map of a layer that tells its own spatial dimensions: a convolution or linear layer."""
    dims = dims_of(node)
    assert dims is not None
    return affine_of(node, dims)


def _sources(node: fx.Node, module: nn.Module) -> frozenset[str]:
    return frozenset(
        f"{node.target}.{name}" for name in module.state_dict() if not name.endswith("num_batches_tracked")
    )


def _conv(node: fx.Node, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Affine:
    spans = zip(module.kernel_size, module.stride, module.dilation, _conv_padding(module), strict=True)
    grid = Grid(tuple(Axis(k, s, d, before, after) for k, s, d, (before, after) in spans), module.padding_mode)
    if not grid.padded:
        grid = Grid(grid.axes)  # a mode that pads nothing is no mode
    return from_tensors(module.weight, module.bias, grid, module.groups, _sources(node, module))


def _conv_padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[tuple[int, int]]:
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(p), int(p)) for p in module.padding]


def norm_obstacle(module: nn.Module) -> str | None:
    """Why a batch norm is not a fixed affine map, or ``None`` when it is one."""
    if getattr(module, "running_mean", None) is None or getattr(module, "running_var", None) is None:
        return "batch norm without running statistics normalises by the statistics of each batch"
    return None


def _norm(node: fx.Node, module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, dims: int) -> Affine:
    if reason := norm_obstacle(module):
        raise InexactError(reason)
    shape = shape_of(node)
    if shape is None and dims == 0:
        raise InexactError(
            "whether BatchNorm1d normalises features or positions depends on the input's rank: pass example_inputs"
        )
    if shape is not None and len(shape) != dims + 2:
        raise InexactError(f"{node.name} normalises dimension 1 of a {len(shape)}-dimensional tensor: not its channels")
    return _scaled_shifted(module, dims, _sources(node, module))


def _scaled_shifted(
    module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, dims: int, sources: frozenset[str]
) -> Affine:
    mean, var, weight, bias, eps = module.running_mean, module.running_var, module.weight, module.bias, module.eps
    assert mean is not None and var is not None

    def scale_shift() -> tuple[Tensor, Tensor]:
        scale, offset = (None if t is None else _float64(t) for t in (weight, bias))
        return kernels.norm_scale_shift(_float64(mean), _float64(var), eps, scale, offset)

    return per_channel(scale_shift, module.num_features, dims, True, sources)


def _channel_affine(node: fx.Node, module: ChannelAffine, dims: int, channels: int | None) -> Affine:
    channels = _in_channels(node, dims, channels)
    if module.weight.dim() and module.axis != (1 if dims else -1):
        raise InexactError(f"{node.name} scales another axis than the channels")
    if module.weight.dim() and len(module.weight) != channels:
        raise InexactError(f"{node.name} makes {len(module.weight)} channels of {channels}")

    weight, bias = module.weight, module.bias

    def scale_shift() -> tuple[Tensor, Tensor | None]:
        return _float64(weight).expand(channels), None if bias is None else _float64(bias).expand(channels)

    return per_channel(scale_shift, channels, dims, bias is not None, _sources(node, module))


def _selection(node: fx.Node, module: nn.Module, dims: int, channels: int | None) -> Affine:
    axis = 1 if isinstance(module, nn.ChannelShuffle) else module.axis
    if axis != (1 if dims else -1):
        raise InexactError(f"{node.name} picks from another axis than the channels")
    channels = _in_channels(node, dims, channels)
    if isinstance(module, nn.ChannelShuffle):
        groups = int(module.groups)
        indices = torch.arange(channels).view(groups, channels // groups).t().flatten().tolist()
        return selection(channels, indices, dims)
    assert isinstance(module, ChannelSlice | ChannelPad)
    if isinstance(module, ChannelSlice):
        return selection(channels, range(module.start, module.start + module.length), dims)
    return selection(channels, (*[-1] * module.before, *range(channels), *[-1] * module.after), dims)


def _in_channels(node: fx.Node, dims: int, channels: int | None) -> int:
    channels = channels or channels_of(node.all_input_nodes[0], dims)
    if channels is None and type(module_of(node)) not in (ChannelSlice, ChannelPad):
        channels = channels_of(node, dims)
    if channels is None:
        raise InexactError(f"the number of channels at {node.name} is unknown: pass example_inputs")
    return channels


def _float64(tensor: Tensor) -> Tensor:
    return on_cpu(tensor, torch.float64)
