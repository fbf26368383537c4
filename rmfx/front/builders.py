"""Builds the layer of ``torch.nn`` that a functional call stands for; weights are shared, never copied.

A builder takes the call's arguments by name and what is known of its input. It gives ``None`` where the call is no
such layer (a pool that returns indices, a norm by batch statistics): the call then stays in the graph as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rmfx.algebra.exact import derive
from rmfx.front.kinds import Kind
from rmfx.modules import Elementwise

Arguments = dict[str, Any]
Builder = Callable[[Arguments, Kind], nn.Module | None]
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """``tensor`` as a parameter over the same memory; itself where it is one."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    parameter = nn.Parameter(tensor, requires_grad=False)
    derive(parameter, lambda same: same, tensor)
    return parameter


def same_memory(tensor: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
    """A view of ``tensor``; of a parameter it is one, too, so that a scale that trains goes on training."""
    made = view(tensor.detach())
    made = nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    return derive(made, view, tensor)


def layer(cls: type[nn.Module]) -> Builder:
    """The layer whose constructor takes the arguments by the same names."""

    def build(arguments: Arguments, kind: Kind) -> nn.Module | None:
        return cls(**{name: value for name, value in arguments.items() if name != "inplace"})

    return build


def elementwise(function: str) -> Builder:
    """A function of every element by itself, of floats: of numbers it is no layer."""

    def build(arguments: Arguments, kind: Kind) -> nn.Module | None:
        return Elementwise(function, **arguments) if kind.floating else None

    return build


def hardtanh(arguments: Arguments, kind: Kind) -> nn.Module | None:
    """``F.hardtanh``: a clamp."""
    return clamp({"min": arguments["min_val"], "max": arguments["max_val"]}, kind)


def clamp(arguments: Arguments, kind: Kind) -> nn.Module | None:
    """A clamp between numbers: ReLU or ReLU6 where the bounds are theirs, else Hardtanh; a missing one is infinite."""
    low, high = arguments.get("min"), arguments.get("max")
    if (low is None and high is None) or (low is not None and high is not None and not low < high):
        return None
    if low == 0 and high is None:
        return nn.ReLU()
    if low == 0 and high == 6:
        return nn.ReLU6()
    return nn.Hardtanh(-torch.inf if low is None else low, torch.inf if high is None else high)


def rrelu(arguments: Arguments, kind: Kind) -> nn.Module | None:
    """``F.rrelu`` that draws no slopes: their mean is the slope."""
    mean = (arguments["lower"] + arguments["upper"]) / 2
    return None if arguments["training"] else nn.LeakyReLU(mean)


def prelu(arguments: Arguments, kind: Kind) -> nn.Module | None:
    """``F.prelu`` with a vector of slopes."""
    slopes = arguments["weight"]
    if slopes.dim() != 1:
        return None
    layer = nn.PReLU(slopes.numel(), device="meta")
    layer.weight = as_parameter(slopes)
    return layer


def conv(dims: int) -> Builder:
    """``F.conv1d`` to ``F.conv3d`` with a constant weight."""

    def build(arguments: Arguments, kind: Kind) -> nn.Module | None:
        weight, bias, groups = arguments["weight"], arguments["bias"], arguments["groups"]
        if not isinstance(weight, Tensor) or weight.dim() != dims + 2 or not weight.is_floating_point():
            return None
        where = {name: arguments[name] for name in ("stride", "padding", "dilation")}
        where = {name: tuple(value) if isinstance(value, list) else value for name, value in where.items()}
        where = {name: value[0] if _is_single(value) else value for name, value in where.items()}
        cls: Any = _CONVS[dims - 1]
        layer: nn.Module = cls(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            **where,
            groups=groups,
            bias=bias is not None,
            device="meta",
        )
        return _with_weights(layer, weight, bias)

    return build


def one_by_one(matrix: Tensor, bias: Tensor | None, dims: int) -> nn.Module:
    """A convolution of ``dims`` dimensions that does at each position what a linear layer does; weights are shared."""
    weight = same_memory(matrix, lambda whole: whole[(..., *(None,) * dims)])
    grid = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    made = conv(dims)({"weight": weight, "bias": bias, **grid}, Kind())
    assert made is not None
    return made


def _is_single(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 1


def linear(arguments: Arguments, kind: Kind) -> nn.Module | None:
    """``F.linear`` with a constant weight."""
    weight, bias = arguments["weight"], arguments["bias"]
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _with_weights(layer, weight, bias)


def _with_weights(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.register_parameter("weight", as_parameter(weight))
    layer.register_parameter("bias", None if bias is None else as_parameter(bias))
    return layer


NORM_OF_RANK = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def batch_norm(arguments: Arguments, kind: Kind) -> nn.Module | None:
    """``F.batch_norm`` by running statistics, where the rank of its input tells which class it is."""
    mean, var = arguments["running_mean"], arguments["running_var"]
    if arguments["training"] or mean is None or var is None or kind.rank not in NORM_OF_RANK:
        return None
    weight, bias = arguments["weight"], arguments["bias"]
    affine = weight is not None or bias is not None
    layer = NORM_OF_RANK[kind.rank](mean.numel(), arguments["eps"], arguments["momentum"], affine, device="meta")
    layer.running_mean, layer.running_var = (derive(t.detach(), lambda same: same, t) for t in (mean, var))
    layer.num_batches_tracked = torch.zeros((), dtype=torch.long, device=mean.device)
    if affine:
        _with_weights(layer, torch.ones_like(mean) if weight is None else weight, bias)
        if bias is None:
            layer.bias = as_parameter(torch.zeros_like(mean))
    return layer


def layer_norm(arguments: Arguments, kind: Kind) -> nn.Module | None:
    """``F.layer_norm``."""
    shape, weight, bias = tuple(arguments["normalized_shape"]), arguments["weight"], arguments["bias"]
    layer = nn.LayerNorm(shape, arguments["eps"], weight is not None, bias is not None, device="meta")
    return None if weight is None and bias is not None else _with_optional(layer, weight, bias)


def group_norm(arguments: Arguments, kind: Kind) -> nn.Module | None:
    """``F.group_norm``, where a weight or the graph tells the number of channels."""
    weight, bias = arguments["weight"], arguments["bias"]
    channels = kind.channels if weight is None else weight.numel()
    if channels is None or (weight is None) != (bias is None):
        return None
    layer = nn.GroupNorm(arguments["num_groups"], channels, arguments["eps"], weight is not None, device="meta")
    return _with_optional(layer, weight, bias)


def _with_optional(layer: nn.Module, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    for name, tensor in (("weight", weight), ("bias", bias)):
        layer.register_parameter(name, None if tensor is None else as_parameter(tensor))
    return layer


def pool(cls: type[nn.Module]) -> Builder:
    """A pool with a window, unless it is asked for indices."""

    def build(arguments: Arguments, kind: Kind) -> nn.Module | None:
        if arguments.pop("return_indices", False):
            return None
        window = {**arguments, "stride": arguments["stride"] or None}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in window.items()})

    return build


def adaptive_pool(cls: type[nn.Module]) -> Builder:
    """A pool to a given size, unless it is asked for indices."""

    def build(arguments: Arguments, kind: Kind) -> nn.Module | None:
        if arguments.get("return_indices"):
            return None
        size = arguments["output_size"]
        return cls(tuple(size) if isinstance(size, list) else size)

    return build


_MEANS: dict[int | None, type[nn.Module]] = {3: nn.AdaptiveAvgPool1d, 4: nn.AdaptiveAvgPool2d, 5: nn.AdaptiveAvgPool3d}


def mean(arguments: Arguments, kind: Kind) -> nn.Module | None:
    """The mean over all positions with ``keepdim=True``: a global average pool."""
    dims, rank = arguments["dim"], kind.rank
    if rank is None or rank not in _MEANS or not arguments["keepdim"] or arguments["dtype"] is not None:
        return None
    dims = [dims] if isinstance(dims, int) else dims or ()
    if sorted(dim % rank for dim in dims) != list(range(2, rank)):
        return None
    return _MEANS[rank](1)


_PADS: dict[str, tuple[Any, ...]] = {
    "constant": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}
_CONSTANT_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)


def pad(arguments: Arguments, kind: Kind) -> nn.Module | None:
    """``F.pad`` on spatial dimensions only, where the rank of its input is known."""
    widths, value, mode = arguments["pad"], arguments["value"] or 0.0, arguments["mode"]
    dims = 0 if kind.rank is None else kind.rank - 2
    if mode not in _PADS or not 1 <= dims <= 3 or len(widths) > 2 * dims:
        return None
    if any(width < 0 for width in widths) and (mode != "constant" or value):
        return None
    widths = (*widths, *(0,) * (2 * dims - len(widths)))
    return _PADS[mode][dims - 1](widths) if not value else _CONSTANT_PADS[dims - 1](widths, value)


def upsample(arguments: Arguments, kind: Kind) -> nn.Module | None:
    """``F.interpolate`` without antialiasing."""
    if arguments.pop("antialias") or arguments["mode"] == "area":
        return None
    return nn.Upsample(**arguments)
