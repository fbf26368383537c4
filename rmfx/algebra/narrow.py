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

    def dense() -> Weights:
        weight, bias = affine.weights()
        return gather(weight, affine.groups, rows, columns), None if bias is None else bias[rows]

    return cheapest(
        replace(
            affine,
            in_channels=len(columns),
            out_channels=len(rows),
            groups=1,
            compute=rounded(dense),
            stored=None,
        )
    )


def cheapest(affine: Affine) -> Affine:
    """The map with its finest groups, its fewest taps, and without a bias of zeros; ``affine`` has one group.

    >>> from rmfx.algebra.affine import from_tensors
    >>> kernel = torch.zeros(4, 4, 3, 3)
    >>> kernel[:, :, 1, 1] = torch.eye(4)
    >>> small = cheapest(from_tensors(kernel, torch.zeros(4), Grid.of((3, 3), padding=(1, 1))))
    >>> small.groups, small.grid.kernel, small.has_bias
    (4, (1, 1), False)
    """
    assert affine.groups == 1
    weight, bias = affine.weights()
    groups = finest_groups(weight)
    has_bias = bias is not None and bool(bias.any())
    grid, kept = _trimmed(affine.grid, weight)

    def compute() -> Weights:
        weight, bias = affine.weights()
        weight = weight[(slice(None), slice(None), *kept)]
        blocks = weight.reshape(groups, weight.shape[0] // groups, groups, weight.shape[1] // groups, *weight.shape[2:])
        index = torch.arange(groups)
        return blocks[index, :, index].flatten(0, 1), bias if has_bias else None

    return replace(affine, groups=groups, grid=grid, has_bias=has_bias, compute=rounded(compute), stored=None)


def finest_groups(weight: Tensor) -> int:
    """The largest number of equal groups, in order, outside of which a dense ``weight`` is 0.

    >>> finest_groups(torch.eye(6)), finest_groups(torch.ones(2, 2))
    (6, 1)
    """
    used = (weight != 0).reshape(*weight.shape[:2], -1).any(2)
    out, width = used.shape
    most = gcd(out, width)
    for groups in (g for g in range(most, 1, -1) if most % g == 0):
        blocks = used.reshape(groups, out // groups, groups, width // groups).any(3).any(1)
        if not bool((blocks & ~torch.eye(groups, dtype=torch.bool)).any()):
            return groups
    return 1


def _trimmed(grid: Grid, weight: Tensor) -> tuple[Grid, tuple[slice, ...]]:
    """The grid without border taps that are 0 for all channels, and the taps that are left."""
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
    if not small.padded:
        small = Grid(small.axes)
    return (small, tuple(kept)) if _is_layer(small) else (grid, tuple(slice(None) for _ in grid.axes))


def _is_layer(grid: Grid) -> bool:
    try:
        return layer_grid(grid)[0] == grid
    except InexactError:
        return False
