"""The table of spellings: which function or method call is which layer of ``torch.nn``.

One line per spelling: the functions and the method that are called so, their arguments with defaults, and what builds
the layer. A builder gives ``None`` where the call is no such layer (a dropout that drops, a pool that returns indices),
and the call stays in the graph as it is. Weights are shared with the graph module, never copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rmfx.kinds import Kind

Arguments = dict[str, Any]
Builder = Callable[[Arguments, Kind], nn.Module | None]
_REQUIRED = object()
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TENSORS = frozenset({"weight", "bias", "running_mean", "running_var"})


@dataclass(frozen=True)
class Spelling:
    """How one function is called, and the layer it stands for.

    Attributes:
        parameters: the arguments after the input, in order, with their defaults.
        build: makes the layer from the bound arguments and what is known of the input.
    """

    parameters: Mapping[str, Any]
    build: Builder


def spell(node: fx.Node, kind: Callable[[fx.Node], Kind], constant: Callable[[fx.Node], Tensor | None]) -> Spelled | None:
    """The layer that a function or method node stands for, with its input, or ``None`` where it is none.

    Args:
        node: any node.
        kind: what is known of a node's value.
        constant: the tensor that a ``get_attr`` node reads, ``None`` for other nodes.
    """
    spelling = METHODS.get(str(node.target)) if node.op == "call_method" else None
    if node.op == "call_function":
        spelling = FUNCTIONS.get(node.target)
    if spelling is None:
        return None
    given = dict(node.kwargs)
    values = node.args or (given.pop("input", None),)
    if not isinstance(values[0], fx.Node) or len(values) > len(spelling.parameters) + 1:
        return None
    if node.target in ("view", "reshape"):
        return _flatten_by_size(node)
    given |= dict(zip(spelling.parameters, values[1:], strict=False))
    if not given.keys() <= spelling.parameters.keys():
        return None
    bound = _bind(spelling.parameters | given, constant)
    layer = None if bound is None else spelling.build(bound, kind(values[0]))
    return None if layer is None else Spelled(layer, values[0])


@dataclass(frozen=True)
class Spelled:
    """A layer and the node it reads."""

    layer: nn.Module
    source: fx.Node


def _bind(given: Mapping[str, Any], constant: Callable[[fx.Node], Tensor | None]) -> Arguments | None:
    bound: Arguments = {}
    for name, value in given.items():
        if value is _REQUIRED:
            return None
        if isinstance(value, fx.Node):
            value = constant(value) if name in _TENSORS else None
            if value is None:
                return None
        elif not _is_constant(value):
            return None
        bound[name] = value
    return bound


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_constant(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """``tensor`` as a parameter over the same memory; itself where it is one."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


# -- builders ---------------------------------------------------------------------------------------------------------


def _layer(cls: type[nn.Module]) -> Builder:
    """The layer whose constructor takes the arguments by the same names."""

    def build(arguments: Arguments, kind: Kind) -> nn.Module | None:
        return cls(**{name: value for name, value in arguments.items() if name != "inplace"})

    return build


def _hardtanh(arguments: Arguments, kind: Kind) -> nn.Module | None:
    return _clamp({"min": arguments["min_val"], "max": arguments["max_val"]}, kind)


def _clamp(arguments: Arguments, kind: Kind) -> nn.Module | None:
    low, high = arguments.get("min"), arguments.get("max")
    if (low is None and high is None) or (low is not None and high is not None and not low < high):
        return None
    if low == 0 and high is None:
        return nn.ReLU()
    if low == 0 and high == 6:
        return nn.ReLU6()
    return nn.Hardtanh(-torch.inf if low is None else low, torch.inf if high is None else high)


def _prelu(arguments: Arguments, kind: Kind) -> nn.Module | None:
    slopes = arguments["weight"]
    if slopes.dim() != 1:
        return None
    layer = nn.PReLU(slopes.numel(), device="meta")
    layer.weight = as_parameter(slopes)
    return layer


def _conv(dims: int) -> Builder:
    def build(arguments: Arguments, kind: Kind) -> nn.Module | None:
        weight, bias, groups = arguments["weight"], arguments["bias"], arguments["groups"]
        if not isinstance(weight, Tensor) or weight.dim() != dims + 2 or not weight.is_floating_point():
            return None
        where = {name: arguments[name] for name in ("stride", "padding", "dilation")}
        where = {name: tuple(value) if isinstance(value, list) else value for name, value in where.items()}
        where = {n: v * dims if isinstance(v, tuple) and len(v) == 1 else v for n, v in where.items()}
        width = (weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]))
        layer = _CONVS[dims - 1](*width, **where, groups=groups, bias=bias is not None, device="meta")
        return _with_weights(layer, weight, bias)

    return build


def _linear(arguments: Arguments, kind: Kind) -> nn.Module | None:
    weight, bias = arguments["weight"], arguments["bias"]
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return _with_weights(layer, weight, bias)


def _with_weights(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.register_parameter("weight", as_parameter(weight))
    layer.register_parameter("bias", None if bias is None else as_parameter(bias))
    return layer


_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def _batch_norm(arguments: Arguments, kind: Kind) -> nn.Module | None:
    mean, var = arguments["running_mean"], arguments["running_var"]
    if arguments["training"] or mean is None or var is None or kind.rank not in _NORMS:
        return None
    weight, bias = arguments["weight"], arguments["bias"]
    affine = weight is not None or bias is not None
    layer = _NORMS[kind.rank](mean.numel(), arguments["eps"], arguments["momentum"], affine, device="meta")
    layer.running_mean, layer.running_var = mean.detach(), var.detach()
    layer.num_batches_tracked = torch.zeros((), dtype=torch.long, device=mean.device)
    if affine:
        _with_weights(layer, torch.ones_like(mean) if weight is None else weight, bias)
        if bias is None:
            layer.bias = as_parameter(torch.zeros_like(mean))
    return layer


def _pool(cls: type[nn.Module]) -> Builder:
    def build(arguments: Arguments, kind: Kind) -> nn.Module | None:
        if arguments.pop("return_indices", False):
            return None
        window = {**arguments, "stride": arguments["stride"] or None}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in window.items()})

    return build


def _adaptive_pool(cls: type[nn.Module]) -> Builder:
    def build(arguments: Arguments, kind: Kind) -> nn.Module | None:
        if arguments.get("return_indices"):
            return None
        size = arguments["output_size"]
        return cls(tuple(size) if isinstance(size, list) else size)

    return build


_MEANS: dict[int | None, type[nn.Module]] = {3: nn.AdaptiveAvgPool1d, 4: nn.AdaptiveAvgPool2d, 5: nn.AdaptiveAvgPool3d}


def _mean(arguments: Arguments, kind: Kind) -> nn.Module | None:
    dims, rank = arguments["dim"], kind.rank
    if rank not in _MEANS or not arguments["keepdim"] or arguments["dtype"] is not None:
        return None
    dims = [dims] if isinstance(dims, int) else dims or ()
    if sorted(dim % rank for dim in dims) != list(range(2, rank)):
        return None
    return _MEANS[rank](1)


_ZERO_PADS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_CONSTANT_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)


def _pad(arguments: Arguments, kind: Kind) -> nn.Module | None:
    widths, value = arguments["pad"], arguments["value"] or 0.0
    dims = 0 if kind.rank is None else kind.rank - 2
    plain = arguments["mode"] == "constant" and 1 <= dims <= 3 and len(widths) <= 2 * dims
    if not plain or any(width < 0 for width in widths):
        return None
    widths = (*widths, *(0,) * (2 * dims - len(widths)))
    return _ZERO_PADS[dims - 1](widths) if value == 0 else _CONSTANT_PADS[dims - 1](widths, value)


def _upsample(arguments: Arguments, kind: Kind) -> nn.Module | None:
    if arguments.pop("antialias") or arguments["mode"] == "area":
        return None
    return nn.Upsample(**arguments)


def _flatten_by_size(node: fx.Node) -> Spelled | None:
    """``x.view(x.size(0), -1)``, which is ``x.flatten(1)``."""
    source, sizes = node.args[0], node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = tuple(sizes[0])
    if len(sizes) != 2 or sizes[1] != -1 or not isinstance(sizes[0], fx.Node) or not isinstance(source, fx.Node):
        return None
    return Spelled(nn.Flatten(), source) if _reads_batch(sizes[0], source) else None


def _reads_batch(size: fx.Node, source: fx.Node) -> bool:
    if size.op == "call_method" and size.target == "size":
        return size.args == (source, 0) or (size.args == (source,) and size.kwargs == {"dim": 0})
    whole = size.args[0] if str(getattr(size.target, "__name__", "")) == "getitem" and size.args[1] == 0 else None
    if not isinstance(whole, fx.Node):
        return False
    return whole.args in ((source,), (source, "shape")) and (whole.target == "size" or whole.target is getattr)


# -- the table --------------------------------------------------------------------------------------------------------

_CONV = {"weight": _REQUIRED, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_STATS = {"running_mean": None, "running_var": None}
_MAX_POOL = {"kernel_size": _REQUIRED, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
_MAX_POOL = {**_MAX_POOL, "return_indices": False}
_AVG_POOL = {"kernel_size": _REQUIRED, "stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True}
_RESIZE = {"size": None, "scale_factor": None, "mode": "nearest", "align_corners": None}
_RESIZE = {**_RESIZE, "recompute_scale_factor": None, "antialias": False}
_BOUNDS = {"min": None, "max": None}
_INPLACE = {"inplace": False}

# name: (parameters, builder); functions of torch, torch.nn.functional and the method are all called so.
_BY_NAME: dict[str, tuple[Mapping[str, Any], Builder]] = {
    "conv1d": (_CONV, _conv(1)),
    "conv2d": (_CONV, _conv(2)),
    "conv3d": (_CONV, _conv(3)),
    "linear": ({"weight": _REQUIRED, "bias": None}, _linear),
    "relu": (_INPLACE, _layer(nn.ReLU)),
    "relu6": (_INPLACE, _layer(nn.ReLU6)),
    "hardtanh": ({"min_val": -1.0, "max_val": 1.0, **_INPLACE}, _hardtanh),
    "clamp": (_BOUNDS, _clamp),
    "clip": (_BOUNDS, _clamp),
    "clamp_min": ({"min": _REQUIRED}, _clamp),
    "clamp_max": ({"max": _REQUIRED}, _clamp),
    "leaky_relu": ({"negative_slope": 0.01, **_INPLACE}, _layer(nn.LeakyReLU)),
    "prelu": ({"weight": _REQUIRED}, _prelu),
    "elu": ({"alpha": 1.0, **_INPLACE}, _layer(nn.ELU)),
    "selu": (_INPLACE, _layer(nn.SELU)),
    "celu": ({"alpha": 1.0, **_INPLACE}, _layer(nn.CELU)),
    "gelu": ({"approximate": "none"}, _layer(nn.GELU)),
    "silu": (_INPLACE, _layer(nn.SiLU)),
    "mish": (_INPLACE, _layer(nn.Mish)),
    "hardswish": (_INPLACE, _layer(nn.Hardswish)),
    "hardsigmoid": (_INPLACE, _layer(nn.Hardsigmoid)),
    "sigmoid": ({}, _layer(nn.Sigmoid)),
    "tanh": ({}, _layer(nn.Tanh)),
    "softplus": ({"beta": 1.0, "threshold": 20.0}, _layer(nn.Softplus)),
    "softsign": ({}, _layer(nn.Softsign)),
    "tanhshrink": ({}, _layer(nn.Tanhshrink)),
    "hardshrink": ({"lambd": 0.5}, _layer(nn.Hardshrink)),
    "softshrink": ({"lambd": 0.5}, _layer(nn.Softshrink)),
    "logsigmoid": ({}, _layer(nn.LogSigmoid)),
    "threshold": ({"threshold": _REQUIRED, "value": _REQUIRED, **_INPLACE}, _layer(nn.Threshold)),
    "max_pool1d": (_MAX_POOL, _pool(nn.MaxPool1d)),
    "max_pool2d": (_MAX_POOL, _pool(nn.MaxPool2d)),
    "max_pool3d": (_MAX_POOL, _pool(nn.MaxPool3d)),
    "avg_pool1d": (_AVG_POOL, _pool(nn.AvgPool1d)),
    "avg_pool2d": ({**_AVG_POOL, "divisor_override": None}, _pool(nn.AvgPool2d)),
    "avg_pool3d": ({**_AVG_POOL, "divisor_override": None}, _pool(nn.AvgPool3d)),
    "adaptive_avg_pool1d": ({"output_size": _REQUIRED}, _adaptive_pool(nn.AdaptiveAvgPool1d)),
    "adaptive_avg_pool2d": ({"output_size": _REQUIRED}, _adaptive_pool(nn.AdaptiveAvgPool2d)),
    "adaptive_avg_pool3d": ({"output_size": _REQUIRED}, _adaptive_pool(nn.AdaptiveAvgPool3d)),
    "adaptive_max_pool1d": ({"output_size": _REQUIRED, "return_indices": False}, _adaptive_pool(nn.AdaptiveMaxPool1d)),
    "adaptive_max_pool2d": ({"output_size": _REQUIRED, "return_indices": False}, _adaptive_pool(nn.AdaptiveMaxPool2d)),
    "adaptive_max_pool3d": ({"output_size": _REQUIRED, "return_indices": False}, _adaptive_pool(nn.AdaptiveMaxPool3d)),
    "mean": ({"dim": None, "keepdim": False, "dtype": None}, _mean),
    "flatten": ({"start_dim": 0, "end_dim": -1}, _layer(nn.Flatten)),
    "pad": ({"pad": _REQUIRED, "mode": "constant", "value": None}, _pad),
    "interpolate": (_RESIZE, _upsample),
    "pixel_shuffle": ({"upscale_factor": _REQUIRED}, _layer(nn.PixelShuffle)),
    "pixel_unshuffle": ({"downscale_factor": _REQUIRED}, _layer(nn.PixelUnshuffle)),
    "channel_shuffle": ({"groups": _REQUIRED}, _layer(nn.ChannelShuffle)),
}


def _functions() -> dict[Callable[..., Any], Spelling]:
    table: dict[Callable[..., Any], Spelling] = {}
    for name, (parameters, build) in _BY_NAME.items():
        for namespace in (torch, F, torch._C._nn):
            if hasattr(namespace, name):
                table[getattr(namespace, name)] = Spelling(parameters, build)
    norm = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    table[F.batch_norm] = Spelling({**_STATS, **norm}, _batch_norm)
    builtin = {"weight": None, "bias": None, **_STATS, "training": _REQUIRED, "momentum": _REQUIRED, "eps": _REQUIRED}
    table[torch.batch_norm] = Spelling({**builtin, "cudnn_enabled": True}, _batch_norm)
    table[F._threshold] = table[F.threshold]  # what torch.fx records for the former
    table[torch._C._nn.log_sigmoid] = table[F.logsigmoid]
    return table


FUNCTIONS = _functions()
METHODS: dict[str, Spelling] = {
    **{name: Spelling(*row) for name, row in _BY_NAME.items() if hasattr(Tensor, name)},
    **{name: Spelling({"size": _REQUIRED}, lambda arguments, kind: None) for name in ("view", "reshape")},
}
