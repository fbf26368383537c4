"""The table of spellings: which function or method call is which layer of ``torch.nn``.

One line per spelling: the functions and the method that are called so, their arguments with defaults, and what builds
the layer. A builder gives ``None`` where the call is no such layer (a dropout that drops, a pool that returns indices),
and the call stays in the graph as it is. Weights are shared with the graph module, never copied.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rmfx.front import builders
from rmfx.front.builders import Arguments, Builder
from rmfx.front.kinds import Kind
from rmfx.modules import Elementwise

_REQUIRED = object()
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


@dataclass(frozen=True)
class Spelled:
    """A layer and the node it reads."""

    layer: nn.Module
    source: fx.Node


Constants = Callable[[fx.Node], Tensor | None]


def spell(node: fx.Node, kind: Callable[[fx.Node], Kind], constant: Constants) -> Spelled | None:
    """The layer that a function or method node stands for, with its input, or ``None`` where it is none.

    Args:
        node: any node.
        kind: what is known of a node's value.
        constant: the tensor that a ``get_attr`` node reads, ``None`` for other nodes.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in ("view", "reshape", torch.reshape):
        return _flatten_by_size(node)
    spelling = _spelling(node)
    if spelling is None:
        return None
    source, given = _given(node, spelling.parameters)
    bound = None if source is None else _bind({**spelling.parameters, **given}, constant)
    if source is None or bound is None or not given.keys() <= spelling.parameters.keys():
        return None
    try:
        layer = spelling.build(bound, kind(source))
    except (ValueError, TypeError, RuntimeError, AssertionError):
        return None  # the call stays: it fails when it runs, as it always did
    return None if layer is None else Spelled(layer, source)


def _spelling(node: fx.Node) -> Spelling | None:
    if isinstance(node.target, str):
        return METHODS.get(node.target)
    return FUNCTIONS.get(node.target)


def _given(node: fx.Node, parameters: Mapping[str, Any]) -> tuple[fx.Node | None, Arguments]:
    """The input of a call and its other arguments, by name."""
    named: Arguments = dict(node.kwargs)
    source, *rest = node.args or (named.pop("input", None),)
    if not isinstance(source, fx.Node) or len(rest) > len(parameters):
        return None, {}
    return source, {**named, **dict(zip(parameters, rest, strict=False))}


def _bind(given: Mapping[str, Any], constant: Constants) -> Arguments | None:
    bound: Arguments = {}
    for name, value in given.items():
        if isinstance(value, fx.Node):
            value = constant(value) if name in _TENSORS else _REQUIRED
        if value is _REQUIRED or (isinstance(given[name], fx.Node) and value is None):
            return None
        if not isinstance(value, Tensor) and not _is_constant(value):
            return None
        bound[name] = value
    return bound


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_constant(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _flatten_by_size(node: fx.Node) -> Spelled | None:
    """``x.view(x.size(0), -1)``, which is ``x.flatten(1)``."""
    source, *sizes = node.args
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = list(sizes[0])
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
_MAX_POOL: Arguments = {"kernel_size": _REQUIRED, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
_MAX_POOL |= {"return_indices": False}
_AVG_POOL = {"kernel_size": _REQUIRED, "stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True}
_AVG_OUT = {"output_size": _REQUIRED}
_MAX_OUT = {**_AVG_OUT, "return_indices": False}
_RESIZE: Arguments = {"size": None, "scale_factor": None, "mode": "nearest", "align_corners": None}
_RESIZE |= {"recompute_scale_factor": None, "antialias": False}
_BOUNDS = {"min": None, "max": None}
_INPLACE = {"inplace": False}

# name: (parameters, builder); functions of torch, torch.nn.functional and the method are all called so.
_BY_NAME: dict[str, tuple[Mapping[str, Any], Builder]] = {
    "conv1d": (_CONV, builders.conv(1)),
    "conv2d": (_CONV, builders.conv(2)),
    "conv3d": (_CONV, builders.conv(3)),
    "linear": ({"weight": _REQUIRED, "bias": None}, builders.linear),
    "layer_norm": ({"normalized_shape": _REQUIRED, "weight": None, "bias": None, "eps": 1e-5}, builders.layer_norm),
    "group_norm": ({"num_groups": _REQUIRED, "weight": None, "bias": None, "eps": 1e-5}, builders.group_norm),
    "relu": (_INPLACE, builders.layer(nn.ReLU)),
    "relu6": (_INPLACE, builders.layer(nn.ReLU6)),
    "hardtanh": ({"min_val": -1.0, "max_val": 1.0, **_INPLACE}, builders.hardtanh),
    "clamp": (_BOUNDS, builders.clamp),
    "clip": (_BOUNDS, builders.clamp),
    "clamp_min": ({"min": _REQUIRED}, builders.clamp),
    "clamp_max": ({"max": _REQUIRED}, builders.clamp),
    "leaky_relu": ({"negative_slope": 0.01, **_INPLACE}, builders.layer(nn.LeakyReLU)),
    "rrelu": ({"lower": 1 / 8, "upper": 1 / 3, "training": False, **_INPLACE}, builders.rrelu),
    "prelu": ({"weight": _REQUIRED}, builders.prelu),
    "elu": ({"alpha": 1.0, **_INPLACE}, builders.layer(nn.ELU)),
    "selu": (_INPLACE, builders.layer(nn.SELU)),
    "celu": ({"alpha": 1.0, **_INPLACE}, builders.layer(nn.CELU)),
    "gelu": ({"approximate": "none"}, builders.layer(nn.GELU)),
    "silu": (_INPLACE, builders.layer(nn.SiLU)),
    "mish": (_INPLACE, builders.layer(nn.Mish)),
    "hardswish": (_INPLACE, builders.layer(nn.Hardswish)),
    "hardsigmoid": (_INPLACE, builders.layer(nn.Hardsigmoid)),
    "sigmoid": ({}, builders.layer(nn.Sigmoid)),
    "tanh": ({}, builders.layer(nn.Tanh)),
    "softplus": ({"beta": 1.0, "threshold": 20.0}, builders.layer(nn.Softplus)),
    "softsign": ({}, builders.layer(nn.Softsign)),
    "tanhshrink": ({}, builders.layer(nn.Tanhshrink)),
    "hardshrink": ({"lambd": 0.5}, builders.layer(nn.Hardshrink)),
    "softshrink": ({"lambd": 0.5}, builders.layer(nn.Softshrink)),
    "logsigmoid": ({}, builders.layer(nn.LogSigmoid)),
    "threshold": ({"threshold": _REQUIRED, "value": _REQUIRED, **_INPLACE}, builders.layer(nn.Threshold)),
    **{name: ({}, builders.elementwise(name)) for name in Elementwise.FUNCTIONS - {"pow"}},
    "pow": ({"exponent": _REQUIRED}, builders.elementwise("pow")),
    "max_pool1d": (_MAX_POOL, builders.pool(nn.MaxPool1d)),
    "max_pool2d": (_MAX_POOL, builders.pool(nn.MaxPool2d)),
    "max_pool3d": (_MAX_POOL, builders.pool(nn.MaxPool3d)),
    "avg_pool1d": (_AVG_POOL, builders.pool(nn.AvgPool1d)),
    "avg_pool2d": ({**_AVG_POOL, "divisor_override": None}, builders.pool(nn.AvgPool2d)),
    "avg_pool3d": ({**_AVG_POOL, "divisor_override": None}, builders.pool(nn.AvgPool3d)),
    "adaptive_avg_pool1d": (_AVG_OUT, builders.adaptive_pool(nn.AdaptiveAvgPool1d)),
    "adaptive_avg_pool2d": (_AVG_OUT, builders.adaptive_pool(nn.AdaptiveAvgPool2d)),
    "adaptive_avg_pool3d": (_AVG_OUT, builders.adaptive_pool(nn.AdaptiveAvgPool3d)),
    "adaptive_max_pool1d": (_MAX_OUT, builders.adaptive_pool(nn.AdaptiveMaxPool1d)),
    "adaptive_max_pool2d": (_MAX_OUT, builders.adaptive_pool(nn.AdaptiveMaxPool2d)),
    "adaptive_max_pool3d": (_MAX_OUT, builders.adaptive_pool(nn.AdaptiveMaxPool3d)),
    "mean": ({"dim": None, "keepdim": False, "dtype": None}, builders.mean),
    "flatten": ({"start_dim": 0, "end_dim": -1}, builders.layer(nn.Flatten)),
    "pad": ({"pad": _REQUIRED, "mode": "constant", "value": None}, builders.pad),
    "interpolate": (_RESIZE, builders.upsample),
    "pixel_shuffle": ({"upscale_factor": _REQUIRED}, builders.layer(nn.PixelShuffle)),
    "pixel_unshuffle": ({"downscale_factor": _REQUIRED}, builders.layer(nn.PixelUnshuffle)),
    "channel_shuffle": ({"groups": _REQUIRED}, builders.layer(nn.ChannelShuffle)),
}


def _functions() -> dict[Callable[..., Any], Spelling]:
    table: dict[Callable[..., Any], Spelling] = {}
    for name, (parameters, build) in _BY_NAME.items():
        for namespace in (torch, F, torch._C._nn, operator):
            if hasattr(namespace, name):
                table[getattr(namespace, name)] = Spelling(parameters, build)
    norm = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    table[F.batch_norm] = Spelling({**_STATS, **norm}, builders.batch_norm)
    builtin = {"weight": None, "bias": None, **_STATS, "training": _REQUIRED, "momentum": _REQUIRED, "eps": _REQUIRED}
    table[torch.batch_norm] = Spelling({**builtin, "cudnn_enabled": True}, builders.batch_norm)
    table[vars(F)["_threshold"]] = table[F.threshold]  # what torch.fx records for F.threshold
    table[torch._C._nn.log_sigmoid] = table[F.logsigmoid]
    return table


FUNCTIONS = _functions()
METHODS = {name: Spelling(*row) for name, row in _BY_NAME.items() if hasattr(Tensor, name)}
