"""The cheapest layers that compute a linear map: often a selection of channels or of positions, which costs nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rmfx.algebra.affine import Affine
from rmfx.algebra.narrow import part, tight
from rmfx.algebra.rows import columns_read
from rmfx.graph.facts import ZERO_PADDING
from rmfx.modules import ChannelAffine, ChannelPad, ChannelSlice

Layer = Affine | nn.Module
_STRIDED = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


def plainly(affine: Affine, trains: bool) -> tuple[Layer, ...]:
    """Layers that compute ``affine`` one behind another; none where it is the identity.

    Args:
        affine: a map with its finest groups (:func:`rmfx.algebra.narrow.cheapest`).
        trains: whether scales become trainable.

    >>> from rmfx.algebra.affine import selection
    >>> plainly(selection(4, [0, 1, 2, 3], 2), False), plainly(selection(4, [-1, 0, 1, 2, 3], 2), False)
    ((), (ChannelPad(before=1, after=0, axis=1),))
    """
    weight, bias = affine.weights()
    if not affine.grid.samples:
        return _average(affine, weight) or _reading_few(affine)
    axis = 1 if affine.grid.dims else -1
    columns, factors = _one_per_row(affine, weight)
    moved = None if columns is None else _moved(affine, columns, factors, bias, axis, trains)
    if moved is None:
        return _reading_few(affine)
    stride = affine.grid.stride
    return moved if affine.unstrided else (_STRIDED[affine.grid.dims - 1](1, stride), *moved)


def _reading_few(affine: Affine) -> tuple[Layer, ...]:
    """The map behind a slice of the channels that it reads, where those are side by side."""
    read = columns_read(affine, torch.ones(affine.out_channels, dtype=torch.bool)).nonzero().flatten()
    if not 0 < len(read) < affine.in_channels:
        return (affine,)
    first, count = int(read[0]), int(read[-1] - read[0]) + 1
    columns = torch.arange(first, first + count)
    few = part(affine, torch.arange(affine.out_channels), columns)
    if few.macs_per_position >= affine.macs_per_position:
        return (affine,)
    return ChannelSlice(first, count, 1 if affine.grid.dims else -1), few


def _one_per_row(affine: Affine, weight: Tensor) -> tuple[Tensor | None, Tensor]:
    """The channel that each row reads (-1 for none) and its factor, where no row reads two."""
    weight = weight.reshape(*weight.shape[:2])
    used = weight != 0
    if bool((used.sum(1) > 1).any()):
        return None, weight
    local = used.int().argmax(1)
    height = affine.out_channels // affine.groups
    columns = local + torch.arange(affine.out_channels) // height * weight.shape[1]
    factors = weight.gather(1, local[:, None])[:, 0]
    return torch.where(used.any(1), columns, -1), factors


def _moved(
    affine: Affine, columns: Tensor, factors: Tensor, bias: Tensor | None, axis: int, trains: bool
) -> tuple[nn.Module, ...] | None:
    read = columns >= 0
    rows = torch.arange(affine.out_channels)
    if affine.in_channels == affine.out_channels and bool((columns == rows)[read].all()):
        if bool((factors == 1).all()) and bias is None:
            return ()
        return (_scale(factors, bias, axis, trains),)
    if bias is not None or not bool(read.any()) or not bool((factors == 1)[read].all()):
        return None
    here = rows[read]
    first, count, source = int(here[0]), len(here), int(columns[here[0]])
    if not torch.equal(columns[read], torch.arange(source, source + count)) or int(here[-1]) != first + count - 1:
        return None
    sliced = () if count == affine.in_channels else (ChannelSlice(source, count, axis),)
    padded = () if count == affine.out_channels else (ChannelPad(first, affine.out_channels - first - count, axis),)
    return (*sliced, *padded)


def _scale(factors: Tensor, bias: Tensor | None, axis: int, trains: bool) -> ChannelAffine:
    if bias is None and bool(((factors == 0) | (factors == 1)).all()):
        return ChannelAffine(factors, None, axis)  # a mask
    own = [None if t is None else nn.Parameter(t.clone(), requires_grad=trains) for t in (factors, bias)]
    assert own[0] is not None
    return ChannelAffine(own[0], own[1], axis)


def _average(affine: Affine, weight: Tensor) -> tuple[nn.Module, ...] | None:
    """The pool that a depthwise map of equal weights is, behind a layer that pads where its sides differ."""
    grid, taps = tight(affine.grid, weight)
    weight = weight[(slice(None), slice(None), *taps)]
    depthwise = affine.groups == affine.in_channels == affine.out_channels and not affine.has_bias
    even = set(grid.dilation) == {1} and grid.mode == "zeros" and grid.taps > 1
    padding = [(axis.before, axis.after) for axis in grid.axes]
    if not (depthwise and even) or min(map(min, padding)) < 0 or not bool((weight == 1 / grid.taps).all()):
        return None
    pool: Callable[..., nn.Module] = _AVERAGES[grid.dims - 1]
    if all(before == after <= axis.kernel // 2 for (before, after), axis in zip(padding, grid.axes, strict=True)):
        return (pool(grid.kernel, grid.stride, tuple(before for before, _ in padding)),)
    sides = tuple(side for pair in reversed(padding) for side in pair)
    return ZERO_PADDING[grid.dims - 1](sides), pool(grid.kernel, grid.stride)  # type: ignore[arg-type]
