"""One layer as JSON: its class, from a closed list, and the constructor arguments that build it again.

``{"class": "torch.nn.Conv2d", "arguments": {"in_channels": 3, ...}, "absent": ["bias"]}``; ``absent`` names the
parameters and buffers that the constructor makes and this layer does not have. Tensor values live elsewhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rmfx.errors import FileFormatError
from rmfx.files.values import Json, decode, encode, shorten
from rmfx.modules import (
    ChannelAffine,
    ChannelClamp,
    ChannelPad,
    ChannelsLast,
    ChannelSlice,
    Elementwise,
    FeatureNorm,
    MaskedActivation,
    SizeGuard,
)

_CONV = "in_channels out_channels kernel_size stride padding dilation groups padding_mode"
_NORM = "num_features eps momentum affine track_running_stats"
_AVG_POOL = "kernel_size stride padding ceil_mode count_include_pad"
_MAX_POOL = "kernel_size stride padding dilation return_indices ceil_mode"

# Constructor arguments, each of which is also an attribute of the module.
_ARGUMENTS: dict[type[nn.Module], str] = {
    nn.Identity: "",
    nn.Flatten: "start_dim end_dim",
    nn.Unflatten: "dim unflattened_size",
    nn.Linear: "in_features out_features",
    nn.Bilinear: "in1_features in2_features out_features",
    nn.Embedding: "num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq sparse",
    nn.MultiheadAttention: "embed_dim num_heads dropout add_zero_attn kdim vdim batch_first",
    nn.GroupNorm: "num_groups num_channels eps affine",
    nn.LayerNorm: "normalized_shape eps elementwise_affine",
    nn.RMSNorm: "normalized_shape eps elementwise_affine",
    nn.LocalResponseNorm: "size alpha beta k",
    nn.AvgPool1d: _AVG_POOL,
    nn.AvgPool2d: f"{_AVG_POOL} divisor_override",
    nn.AvgPool3d: f"{_AVG_POOL} divisor_override",
    nn.LPPool1d: "norm_type kernel_size stride ceil_mode",
    nn.LPPool2d: "norm_type kernel_size stride ceil_mode",
    nn.Upsample: "size scale_factor mode align_corners recompute_scale_factor",
    nn.UpsamplingNearest2d: "size scale_factor",
    nn.UpsamplingBilinear2d: "size scale_factor",
    nn.PixelShuffle: "upscale_factor",
    nn.PixelUnshuffle: "downscale_factor",
    nn.ChannelShuffle: "groups",
    nn.Fold: "output_size kernel_size dilation padding stride",
    nn.Unfold: "kernel_size dilation padding stride",
    nn.ReLU: "inplace",
    nn.ReLU6: "inplace",
    nn.Hardtanh: "min_val max_val inplace",
    nn.LeakyReLU: "negative_slope inplace",
    nn.PReLU: "num_parameters init",
    nn.RReLU: "lower upper inplace",
    nn.ELU: "alpha inplace",
    nn.CELU: "alpha inplace",
    nn.SELU: "inplace",
    nn.GELU: "approximate",
    nn.SiLU: "inplace",
    nn.Mish: "inplace",
    nn.Hardswish: "inplace",
    nn.Hardsigmoid: "inplace",
    nn.Sigmoid: "",
    nn.LogSigmoid: "",
    nn.Tanh: "",
    nn.Tanhshrink: "",
    nn.Softsign: "",
    nn.Softplus: "beta threshold",
    nn.Softshrink: "lambd",
    nn.Hardshrink: "lambd",
    nn.Threshold: "threshold value inplace",
    nn.GLU: "dim",
    nn.Softmax: "dim",
    nn.Softmin: "dim",
    nn.LogSoftmax: "dim",
    nn.Softmax2d: "",
    Elementwise: "function exponent",
    SizeGuard: "sizes reason",
    ChannelsLast: "",
    ChannelSlice: "start length axis",
    ChannelPad: "before after axis",
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONV),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), f"{_CONV} output_padding"),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _NORM),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _NORM),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _MAX_POOL),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), "output_size"),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), "output_size return_indices"),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), "p inplace"),
    **dict.fromkeys((nn.AlphaDropout, nn.FeatureAlphaDropout), "p inplace"),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), "padding"),
    **dict.fromkeys((nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), "padding value"),
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d), "padding"),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d), "padding"),
    **dict.fromkeys((nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d), "padding"),
}


@dataclass(frozen=True)
class _Kind:
    """The constructor arguments of a layer, how to read them off a module, how to build a module from them."""

    names: frozenset[str]
    read: Callable[[Any, str], object]
    build: Callable[..., nn.Module]
    added: Mapping[str, object] = field(default_factory=dict)  # what files from before an argument was there mean


def _vector(channels: int | None, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(() if channels is None else (channels,), dtype=dtype)


def _channel_affine(channels: int | None, axis: int, trained: object) -> ChannelAffine:
    """``trained`` names the tensors that train; files from before that was told of each say it of both."""
    named = {"weight", "bias"} if trained is True else set(trained or ())  # type: ignore[call-overload]
    tensors = {name: _vector(channels) for name in ("weight", "bias")}
    if not named <= tensors.keys():
        raise ValueError(f"{sorted(named)} are not among {sorted(tensors)}")
    return ChannelAffine(**{n: nn.Parameter(t) if n in named else t for n, t in tensors.items()}, axis=axis)


def _affine_argument(module: ChannelAffine, name: str) -> object:
    return sorted(module._parameters) if name == "trained" else _per_channel("weight")(module, name)


def _channel_clamp(channels: int | None, axis: int) -> ChannelClamp:
    return ChannelClamp(_vector(channels), _vector(channels), axis)


def _masked_activation(activation: object, channels: int | None, axis: int) -> MaskedActivation:
    if not isinstance(activation, nn.Module):
        raise TypeError("the activation is no layer")
    return MaskedActivation(activation, _vector(channels, torch.bool), axis)


def _feature_norm(norm: object) -> FeatureNorm:
    if not isinstance(norm, nn.BatchNorm1d):
        raise TypeError("the norm is no BatchNorm1d")
    return FeatureNorm(norm)


def _per_channel(buffer: str) -> Callable[[Any, str], object]:
    """Read "channels" off the length of ``buffer``, and every other argument off its attribute."""

    def read(module: Any, name: str) -> object:
        if name != "channels":
            return getattr(module, name)
        vector = getattr(module, buffer)
        return len(vector) if vector.dim() else None

    return read


_KINDS: dict[type[nn.Module], _Kind] = {
    **{layer: _Kind(frozenset(names.split()), getattr, layer) for layer, names in _ARGUMENTS.items()},
    ChannelAffine: _Kind(
        frozenset({"channels", "axis", "trained"}), _affine_argument, _channel_affine, {"trained": False}
    ),
    ChannelClamp: _Kind(frozenset({"channels", "axis"}), _per_channel("low"), _channel_clamp),
    FeatureNorm: _Kind(frozenset({"norm"}), getattr, _feature_norm),
    MaskedActivation: _Kind(frozenset({"activation", "channels", "axis"}), _per_channel("mask"), _masked_activation),
}
_CLASSES = {f"{'rmfx.modules' if 'rmfx' in c.__module__ else 'torch.nn'}.{c.__name__}": c for c in _KINDS}
_NAMES = {layer: name for name, layer in _CLASSES.items()}
_TENSOR_STORES = ("_parameters", "_buffers", "_modules")


def is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is exactly one of the classes that a file may hold."""
    return type(module) in _KINDS


def slots(module: nn.Module) -> dict[str, str]:
    """The tensors that ``module`` has: dotted name to ``"parameter"`` or ``"buffer"``."""
    parameters = {name: "parameter" for name, _ in module.named_parameters(remove_duplicate=False)}
    return parameters | {name: "buffer" for name, _ in module.named_buffers(remove_duplicate=False)}


def encode_layer(module: nn.Module) -> dict[str, Json]:
    """``module`` as JSON, proven to build the same layer again.

    Raises:
        FileFormatError: for a class outside the list, for hooks, and for a module that was changed after its
            construction in a way that its constructor cannot repeat.

    >>> encode_layer(nn.ReLU())
    {'class': 'torch.nn.ReLU', 'arguments': {'inplace': False}, 'absent': []}
    """
    if not is_layer(module):
        raise FileFormatError(f"{type(module).__module__}.{type(module).__qualname__} is no layer of the file format")
    kind = _KINDS[type(module)]
    values = {name: kind.read(module, name) for name in sorted(kind.names)}
    arguments = {
        name: encode_layer(value) if isinstance(value, nn.Module) else encode(value) for name, value in values.items()
    }
    entry: dict[str, Any] = {"class": _NAMES[type(module)], "arguments": arguments, "absent": []}
    entry["absent"] = sorted(slots(decode_layer(entry)).keys() - slots(module).keys())
    _demand_same(module, decode_layer(entry))
    return entry


def decode_layer(entry: object, nesting: int = 0) -> nn.Module:
    """Build the layer on the meta device: no memory, no random initialisation.

    Raises:
        FileFormatError: when ``entry`` is not what :func:`encode_layer` writes.
    """
    if nesting > 2 or not isinstance(entry, dict) or entry.keys() != {"class", "arguments", "absent"}:
        raise FileFormatError(f"not a layer: {shorten(entry)}")
    name, given, absent = entry["class"], entry["arguments"], entry["absent"]
    if not isinstance(name, str) or name not in _CLASSES:
        raise FileFormatError(f"unknown layer class {shorten(name)}")
    if not isinstance(given, dict) or not isinstance(absent, list):
        raise FileFormatError(f"not the arguments of {name}: {shorten(given)}")
    arguments = {key: _argument(value, nesting) for key, value in given.items()}
    layer = _build(_CLASSES[name], arguments)
    for slot in absent:
        _clear(layer, slot)
    return layer


def _argument(value: object, nesting: int) -> Any:
    if isinstance(value, dict) and "class" in value:
        return decode_layer(value, nesting + 1)
    return decode(value, {})


def _build(layer: type[nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    kind = _KINDS[layer]
    arguments = {**kind.added, **arguments}
    if arguments.keys() != kind.names:
        raise FileFormatError(f"{_NAMES[layer]} takes {sorted(kind.names)}, not {shorten(sorted(arguments))}")
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of tensors without elements
            return kind.build(**arguments)
    except Exception as problem:  # a damaged file can make a constructor raise anything
        raise FileFormatError(f"{_NAMES[layer]} cannot be built from {shorten(arguments)}: {problem}") from problem


def _clear(layer: nn.Module, slot: object) -> None:
    kind = slots(layer).get(slot) if isinstance(slot, str) else None
    if kind is None:
        raise FileFormatError(f"{type(layer).__name__} has no tensor {shorten(slot)}")
    path, _, key = str(slot).rpartition(".")
    setattr(layer.get_submodule(path), key, None)


def _demand_same(module: nn.Module, rebuilt: nn.Module) -> None:
    """Raise unless every submodule, slot and attribute of ``module`` came back."""
    mine, theirs = dict(module.named_modules()), dict(rebuilt.named_modules())
    if mine.keys() != theirs.keys() or slots(module) != slots(rebuilt):
        raise FileFormatError(f"this {type(module).__name__} has parts that its constructor does not make")
    for name, part in mine.items():
        changed = _changed_attribute(part, theirs[name])
        if changed:
            raise FileFormatError(f"this {type(part).__name__} was changed after its construction: {changed}")


def _changed_attribute(part: nn.Module, rebuilt: nn.Module) -> str | None:
    """The first attribute that differs, or that hides a method of the class."""
    missing = object()
    for key, value in vars(rebuilt).items():
        if key not in (*_TENSOR_STORES, "training") and vars(part).get(key, missing) != value:
            return key
    extra = vars(part).keys() - vars(rebuilt).keys()
    return next((key for key in sorted(extra) if hasattr(type(part), key)), None)
