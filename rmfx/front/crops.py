"""Crops of images and sequences by constant widths are spelled as the zero padding of negative width that they are.

x[:, :, :-4]            =>  ZeroPad1d((0, -4)), the "chomp" of a causal convolution
x[..., 2:-2, 2:-2]      =>  ZeroPad2d((-2, -2, -2, -2))

Where an image is smaller than its crop, a slice gives an empty tensor, and the padding raises torch's error, which
names both. A positive end depends on the size of the image, so such a slice stays.
"""

from __future__ import annotations

import operator

from torch import fx, nn

from rmfx.front.channels import cuts
from rmfx.front.install import Installer
from rmfx.front.kind_table import KindTable

_PADS: dict[int, type[nn.Module]] = {3: nn.ZeroPad1d, 4: nn.ZeroPad2d, 5: nn.ZeroPad3d}  # by rank


def spell_crop(node: fx.Node, installer: Installer, kinds: KindTable) -> bool:
    """Make a slice of all spatial positions but constant numbers at the ends a padding; whether ``node`` was one."""
    source = node.args[0] if node.args else None
    if node.target is not operator.getitem or not isinstance(source, fx.Node):
        return False
    rank = kinds[source].rank
    found = cuts(node.args[1], rank)
    if not found or rank not in _PADS or any(axis < 2 for axis, _ in found):
        return False
    widths = {axis: _widths(part) for axis, part in found}
    sides = [widths.get(axis, (0, 0)) for axis in reversed(range(2, rank))]
    if None in sides or _is_empty(source, sides):
        return False
    installer.layer(node, _PADS[rank](tuple(width for side in sides if side for width in side)), source)
    return True


def _widths(part: slice) -> tuple[int, int] | None:
    """How wide the padding on both sides is that a slice of one axis stands for."""
    start, stop = part.start or 0, part.stop
    known = type(start) is int and start >= 0 and (stop is None or (type(stop) is int and stop < 0))
    return (-start, stop or 0) if known and part.step in (None, 1) else None


def _is_empty(source: fx.Node, sides: list[tuple[int, int] | None]) -> bool:
    """Whether nothing is left of the example input, which only a slice allows."""
    shape = source.meta.get("shape", ())
    return any(side is not None and size + sum(side) < 1 for size, side in zip(reversed(shape), sides, strict=False))
