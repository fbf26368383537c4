"""Where a convolution or a pool puts its window: kernel, stride, dilation, and padding in all spellings of ONNX."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from rmfx.onnx_in.call import Call

_PADS: tuple[Any, ...] = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_ZERO_PADS: tuple[Any, ...] = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)


@dataclass(frozen=True)
class Window:
    """One entry per spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def symmetric(self) -> bool:
        """Whether as much is padded after as before."""
        return self.before == self.after

    def unpadded(self) -> Window:
        """The same window without padding."""
        none = (0,) * len(self.kernel)
        return replace(self, before=none, after=none)


def window(call: Call, kernel: tuple[int, ...] | None = None) -> Window:
    """Read the attributes of ``call``; ``kernel`` is the shape of its weight, where it has one."""
    kernel = tuple(call.attribute("kernel_shape", kernel))
    ones, dims = (1,) * len(kernel), len(kernel)
    stride, dilation = tuple(call.attribute("strides", ones)), tuple(call.attribute("dilations", ones))
    pads = tuple(call.attribute("pads", (0,) * (2 * dims)))
    auto = call.attribute("auto_pad", "NOTSET")
    where = Window(kernel, stride, dilation, pads[:dims], pads[dims:])
    if auto in ("NOTSET", ""):
        return where
    return where.unpadded() if auto == "VALID" else _same(call, where, upper=auto == "SAME_UPPER")


def _same(call: Call, where: Window, upper: bool) -> Window:
    """``auto_pad=SAME_*``: as much padding as makes the output ``ceil(size / stride)`` long."""
    sizes = (call.shape() or ())[2:] or (None,) * len(where.kernel)
    before, after = [], []
    for size, kernel, stride, dilation in zip(sizes, where.kernel, where.stride, where.dilation, strict=True):
        reach = dilation * (kernel - 1) + 1
        if stride == 1:
            total = reach - 1
        elif size is None:
            call.fail("auto_pad with a stride depends on the input's size, which is not fixed in the file")
        else:
            total = max((-(-size // stride) - 1) * stride + reach - size, 0)
        low, high = total // 2, total - total // 2
        before.append(low if upper else high)
        after.append(high if upper else low)
    return replace(where, before=tuple(before), after=tuple(after))


def pad_before(call: Call, source: fx.Node, where: Window, value: float = 0.0) -> fx.Node:
    """A layer that pads ``source`` as ``where`` says."""
    widths = [width for pair in zip(reversed(where.before), reversed(where.after), strict=True) for width in pair]
    dims = len(where.kernel)
    layer = _ZERO_PADS[dims - 1](tuple(widths)) if value == 0 else _PADS[dims - 1](tuple(widths), value)
    return call.layer(layer, source)
