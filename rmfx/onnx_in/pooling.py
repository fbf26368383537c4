"""Pools, padding and resizing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmfx.onnx_in.call import Call, Rules, Value
from rmfx.onnx_in.windows import pad_before, window

_MAX: tuple[Any, ...] = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGE: tuple[Any, ...] = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_GLOBAL_MAX: tuple[Any, ...] = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
_GLOBAL_AVERAGE: tuple[Any, ...] = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_PADS: dict[str, tuple[Any, ...]] = {
    "constant": (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    "zero": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "edge": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "wrap": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}
_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


def max_pool(call: Call) -> Value:
    """``MaxPool``; padding that torch does not take becomes a layer of minus infinities in front."""
    if any(output.uses() for output in call.node.outputs[1:]):
        call.fail("its indices are read by other nodes")
    where = window(call)
    source = call.tensor()
    if not where.symmetric or any(2 * pad > size for pad, size in zip(where.before, where.kernel, strict=True)):
        source, where = pad_before(call, source, where, -math.inf), where.unpadded()
    ceil = bool(call.attribute("ceil_mode", 0))
    layer = _MAX[len(where.kernel) - 1](where.kernel, where.stride, where.before, where.dilation, ceil_mode=ceil)
    return call.layer(layer, source)


def average_pool(call: Call) -> Value:
    """``AveragePool``."""
    where = window(call)
    if any(step != 1 for step in where.dilation):
        call.fail("a dilated average pool, which torch does not have")
    counted = bool(call.attribute("count_include_pad", 0)) or not any((*where.before, *where.after))
    source = call.tensor()
    if not where.symmetric or any(2 * pad > size for pad, size in zip(where.before, where.kernel, strict=True)):
        if not counted:
            call.fail("padding that is not symmetric and not counted, which torch's pools do not have")
        source, where = pad_before(call, source, where), where.unpadded()
    ceil = bool(call.attribute("ceil_mode", 0))
    return call.layer(_AVERAGE[len(where.kernel) - 1](where.kernel, where.stride, where.before, ceil, counted), source)


def global_average(call: Call) -> Value:
    """``GlobalAveragePool``."""
    return call.layer(_by_rank(call, _GLOBAL_AVERAGE)(1))


def global_max(call: Call) -> Value:
    """``GlobalMaxPool``."""
    return call.layer(_by_rank(call, _GLOBAL_MAX)(1))


def _by_rank(call: Call, layers: tuple[Any, ...]) -> Any:
    rank = call.rank()
    if not 3 <= rank <= 5:
        call.fail(f"its input has {rank} dimensions, torch has this layer for 3 to 5")
    return layers[rank - 3]


def pad(call: Call) -> Value:
    """``Pad``: a layer on the spatial dimensions, ``F.pad`` where others are padded, too."""
    widths, rank = call.ints(1, "pads"), call.rank()
    if widths is None:
        call.fail("its widths are missing")
    axes = call.ints(3, "axes") if call.has(3) else None
    axes = list(range(rank)) if axes is None else [axis % rank for axis in axes]
    low, high = [0] * rank, [0] * rank
    for axis, before, after in zip(axes, widths, widths[len(axes) :], strict=False):
        low[axis], high[axis] = before, after
    if not any((*low, *high)):
        return call.value(0)
    mode, value = call.attribute("mode", "constant"), _pad_value(call)
    flat = tuple(width for axis in reversed(range(rank)) for width in (low[axis], high[axis]))
    spatial = 3 <= rank <= 5 and not any(flat[2 * (rank - 2) :]) and min(flat) >= 0
    kind = "zero" if mode == "constant" and value == 0 else mode
    if not spatial:
        if mode != "constant":
            call.fail(f"padding of mode {mode!r} outside the spatial dimensions")
        return call.function(F.pad, call.tensor(), flat, "constant", value)
    if kind not in _PADS:
        call.fail(f"padding of the unknown mode {mode!r}")
    flat = flat[: 2 * (rank - 2)]
    layer = _PADS[kind][rank - 3]
    return call.layer(layer(flat, value) if kind == "constant" else layer(flat))


def _pad_value(call: Call) -> float:
    if "value" in call.node.attributes:
        return float(call.attribute("value"))
    found = call.optional(2, "padding value")
    return 0.0 if found is None else found.item()


def resize(call: Call) -> Value:
    """``Resize`` and ``Upsample``, in the modes for which torch interpolates by the same formula."""
    rank = call.rank()
    size, factors = _resized(call, rank)
    mode = call.attribute("mode", "nearest")
    if mode == "nearest":
        _demand_floor(call, size, factors)
        return call.layer(nn.Upsample(size, factors, "nearest"))
    where = _coordinates(call)
    if where not in ("half_pixel", "pytorch_half_pixel", "align_corners") or call.attribute("exclude_outside", 0):
        call.fail(f"mode {mode!r} at coordinates {where!r}: torch interpolates at half pixels or aligned corners")
    if call.attribute("antialias", 0) or rank not in _LINEAR:
        call.fail(f"mode {mode!r} with antialiasing, or of {rank} dimensions")
    if mode == "cubic" and (rank != 4 or not math.isclose(call.attribute("cubic_coeff_a", -0.75), -0.75)):
        call.fail("a cubic kernel that is not torch's")
    return call.layer(
        nn.Upsample(size, factors, "bicubic" if mode == "cubic" else _LINEAR[rank], where == "align_corners")
    )


def _coordinates(call: Call) -> str:
    default = "half_pixel" if call.node.op_type == "Resize" and call.opset >= 11 else "asymmetric"
    return str(call.attribute("coordinate_transformation_mode", default))


def _resized(call: Call, rank: int) -> tuple[tuple[int, ...] | None, tuple[float, ...] | None]:
    """Size or scale of each spatial dimension."""
    if call.attribute("axes") is not None or call.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
        call.fail("sizes of some axes only, or a kept aspect ratio")
    sizes = call.ints(3, "sizes")
    if sizes is not None:
        if list((call.shape() or ())[1:2]) != sizes[1:2]:
            call.fail("its sizes may change the number of channels")
        return tuple(sizes[2:]), None
    scales = _scales(call)
    if len(scales) != rank or any(scale != 1 for scale in scales[:2]):
        call.fail(f"scales {tuple(scales)} for an input of {rank} dimensions, of which batch and channels must stay")
    return None, tuple(scales[2:])


def _scales(call: Call) -> list[float]:
    if "scales" in call.node.attributes:
        return [float(scale) for scale in call.attribute("scales")]
    index = 2 if call.node.op_type == "Resize" and call.opset >= 11 else 1
    found: Tensor | None = call.optional(index, "scale")
    if found is None:
        call.fail("it has neither sizes nor scales")
    return [float(scale) for scale in found]


def _demand_floor(call: Call, size: tuple[int, ...] | None, factors: tuple[float, ...] | None) -> None:
    """Refuse what is not ``floor(i / scale)``, torch's formula for the nearest neighbour."""
    where = _coordinates(call)
    default = "round_prefer_floor" if call.node.op_type == "Resize" and call.opset >= 11 else "floor"
    rounding = call.attribute("nearest_mode", default)
    if where == "asymmetric" and rounding == "floor":
        return
    if size is not None:
        shape = (call.shape() or ())[2:]
        factors = tuple(new / old if old else math.nan for new, old in zip(size, shape, strict=False))
    # At whole scales, the nearest pixel centre is that of the pixel an output lies in.
    centred = where in ("half_pixel", "pytorch_half_pixel") and rounding in ("round_prefer_floor", "round_prefer_ceil")
    if not (centred and factors and all(factor == round(factor) >= 1 for factor in factors if factor == factor)):
        call.fail(f"the nearest neighbour at coordinates {where!r}, rounded by {rounding!r}: torch takes another pixel")
    if any(factor != factor for factor in factors):
        call.fail("the nearest neighbour at an unknown scale")


def depth_to_space(call: Call) -> Value:
    """``DepthToSpace``: a pixel shuffle in mode CRD; mode DCR permutes the channels first."""
    block = call.attribute("blocksize")
    if call.attribute("mode", "DCR") == "CRD":
        return call.layer(nn.PixelShuffle(block))
    channels = (call.shape() or (None, None))[1]
    if channels is None:
        call.fail("the number of channels is not known")
    order = torch.arange(channels).reshape(block * block, -1).T.flatten()
    index = call.writer.constant(order, "channels")
    return call.layer(nn.PixelShuffle(block), call.function(torch.index_select, call.tensor(), 1, index))


def space_to_depth(call: Call) -> Value:
    """``SpaceToDepth``: a pixel unshuffle, whose channels are permuted afterwards."""
    block, channels = call.attribute("blocksize"), (call.shape() or (None, None))[1]
    if channels is None:
        call.fail("the number of channels is not known")
    order = torch.arange(channels * block * block).reshape(channels, -1).T.flatten()
    index = call.writer.constant(order, "channels")
    return call.function(torch.index_select, call.layer(nn.PixelUnshuffle(block)), 1, index)


RULES: Rules = {
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average,
    "GlobalMaxPool": global_max,
    "Pad": pad,
    "Resize": resize,
    "Upsample": resize,
    "DepthToSpace": depth_to_space,
    "SpaceToDepth": space_to_depth,
}
