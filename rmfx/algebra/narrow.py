"""Chosen rows and columns of a map, in the form that costs least: the finest groups, the fewest taps."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from rmfx.algebra.affine import Affine, Weights, rounded
from rmfx.algebra.grid import Axis, Grid, layer_grid
from rmfx.errors import InexactError


def gather(weight: Tensor, groups: int, rows: Tensor, columns: Tensor) -> Tensor:
    """The weights by which ``rows`` read ``columns``, ``[rows, columns, *kernel]``, of a map with ``groups``.

    >>> gather(torch.tensor([[1.0], [2.0]]), 2, torch.tensor([1]), torch.tensor([0, 1])).tolist()
    [[0.0, 2.0]]
    """
    if groups == 1:
        return weight[rows][:, columns]
    height, width = weight.shape[0] // groups, weight.shape[1]
    local = columns[None] - (rows // height * width)[:, None]
    inside = ((local >= 0) & (local < width)).reshape(*local.shape, *[1] * (weight.dim() - 2))
    return torch.where(inside, weight[rows[:, None], local.clamp(0, width - 1)], 0.0)


def part(affine: Affine, rows: Tensor, columns: Tensor) -> Affine:
    """The channels ``rows`` of ``affine`` as functions of the channels ``columns``; other columns count as zeros.

    Reads the weights, to find the finest groups outside of which all of them are 0, and the taps that are all 0.

    >>> from rmfx.algebra.affine import from_tensors
    >>> narrow = part(from_tensors(torch.eye(4), None, Grid()), torch.tensor([0, 2]), torch.tensor([0, 2, 3]))
    >>> narrow.in_channels, narrow.out_channels, narrow.groups
    (3, 2, 1)
    """
    if len(rows) == affine.out_channels and len(columns) == affine.in_channels:
        return affine
    groups = _groups_left(affine, rows, columns)

    def compute() -> Weights:
        weight, bias = affine.weights()
        if groups == 1:
            weight = gather(weight, affine.groups, rows, columns)
        else:
            width = weight.shape[1]
            own = (columns % width).reshape(groups, 1, -1).expand(groups, len(rows) // groups, -1).flatten(0, 1)
            weight = weight[rows[:, None], own]
        return weight, None if bias is None else bias[rows]

    narrow = replace(affine, in_channels=len(columns), out_channels=len(rows), groups=groups, stored=None)
    return cheapest(replace(narrow, compute=rounded(compute)))


def _groups_left(affine: Affine, rows: Tensor, columns: Tensor) -> int:
    """How many groups the chosen rows and columns (both in order) make, 1 where they differ in size."""
    height, width = affine.out_channels // affine.groups, affine.in_channels // affine.groups
    counts = [torch.bincount(index, minlength=affine.groups) for index in (rows // height, columns // width)]
    left = (counts[0] > 0) | (counts[1] > 0)
    equal = all(bool((count[left] == count[left][:1]).all()) and int(count[left][0]) > 0 for count in counts)
    return int(left.sum()) if equal else 1


def cheapest(affine: Affine) -> Affine:
    """The map with its finest groups within those it has, its fewest taps, and without a bias of zeros.

    >>> from rmfx.algebra.affine import from_tensors
    >>> kernel = torch.zeros(4, 4, 3, 3)
    >>> kernel[:, :, 1, 1] = torch.eye(4)
    >>> small = cheapest(from_tensors(kernel, torch.zeros(4), Grid.of((3, 3), padding=(1, 1))))
    >>> small.groups, small.grid.kernel, small.has_bias
    (4, (1, 1), False)
    """
    weight, bias = affine.weights()
    parts = finest_groups(weight.reshape(affine.groups, -1, *weight.shape[1:]))
    has_bias = bias is not None and bool(bias.any())
    grid, kept = _trimmed(affine.grid, weight)

    def compute() -> Weights:
        weight, bias = affine.weights()
        weight = weight[(slice(None), slice(None), *kept)]
        shape = (affine.groups, parts, weight.shape[0] // affine.groups // parts, parts, weight.shape[1] // parts)
        index = torch.arange(parts)
        blocks = weight.reshape(*shape, *weight.shape[2:])[:, index, :, index]  # [part, group, ...]
        return blocks.transpose(0, 1).flatten(0, 2), bias if has_bias else None

    groups = affine.groups * parts
    return replace(affine, groups=groups, grid=grid, has_bias=has_bias, compute=rounded(compute), stored=None)


def finest_groups(weight: Tensor) -> int:
    """The largest number of equal parts, in order, outside of which the blocks ``[groups, out, in, ...]`` are 0.

    >>> finest_groups(torch.eye(6)[None]), finest_groups(torch.ones(1, 2, 2))
    (6, 1)
    """
    used = (weight != 0).reshape(*weight.shape[:3], -1).any(3).any(0)
    out, width = used.shape
    most = gcd(out, width)
    for parts in (number for number in range(most, 1, -1) if most % number == 0):
        blocks = used.reshape(parts, out // parts, parts, width // parts).any(3).any(1)
        if not bool((blocks & ~torch.eye(parts, dtype=torch.bool)).any()):
            return parts
    return 1


def tight(grid: Grid, weight: Tensor) -> tuple[Grid, tuple[slice, ...]]:
    """The grid without border taps that are 0 for all channels, and the taps that are left.

    No layer may pad as unevenly as that grid.
    """
    used = (weight != 0).reshape(-1, *grid.kernel).any(0)
    axes, kept = [], []
    for index, axis in enumerate(grid.axes):
        others = [other for other in range(grid.dims) if other != index]
        taps = (used.any(others) if others else used).nonzero().flatten().tolist() or [0]
        first, last = taps[0], taps[-1]
        before = axis.before - first * axis.dilation
        after = axis.excess - before + axis.dilation * (last - first)
        axes.append(Axis(last - first + 1, axis.stride, axis.dilation if last > first else 1, before, after))
        kept.append(slice(first, last + 1))
    small = Grid(tuple(axes), grid.mode)
    return (small if small.padded else Grid(small.axes)), tuple(kept)


def _trimmed(grid: Grid, weight: Tensor) -> tuple[Grid, tuple[slice, ...]]:
    small, kept = tight(grid, weight)
    return (small, kept) if _is_layer(small) else (grid, tuple(slice(None) for _ in grid.axes))


def _is_layer(grid: Grid) -> bool:
    try:
        return layer_grid(grid)[0] == grid
    except InexactError:
        return False
