"""Parts of a linear map: some of its output channels as functions of some of its input channels."""

from __future__ import annotations

from dataclasses import replace

from rmfx.algebra import kernels
from rmfx.algebra.affine import Affine, Weights, rounded

Span = tuple[int, int]  # first channel, number of channels


def zero_part(affine: Affine, rows: Span, channels: int) -> Affine:
    """The channels ``rows`` of ``affine``, which no input reaches, as a map of any ``channels``: zeros and the bias."""

    def compute() -> Weights:
        weight, bias = affine.weights()
        zeros = weight.new_zeros(rows[1], channels, *weight.shape[2:])
        return zeros, None if bias is None else bias[rows[0] : rows[0] + rows[1]]

    return replace(affine, in_channels=channels, out_channels=rows[1], groups=1, compute=rounded(compute), stored=None)


def restrict(affine: Affine, rows: Span, columns: Span) -> Affine | None:
    """The part of ``affine`` that makes the channels ``rows`` out of the channels ``columns``; ``None`` where it is 0.

    Groups are kept where both spans are whole groups. The bias is that of the rows.

    >>> import torch
    >>> from rmfx.algebra.affine import from_tensors
    >>> from rmfx.algebra.grid import Grid
    >>> grouped = from_tensors(torch.arange(4.0).reshape(4, 1, 1, 1), None, Grid.sampling((1, 1)), groups=4)
    >>> restrict(grouped, (1, 2), (1, 2)).weights()[0].flatten().tolist(), restrict(grouped, (0, 1), (2, 2))
    ([1.0, 2.0], None)
    """
    if rows == (0, affine.out_channels) and columns == (0, affine.in_channels):
        return affine
    height, width = affine.out_channels // affine.groups, affine.in_channels // affine.groups
    first, last = rows[0] // height, (rows[0] + rows[1] - 1) // height
    if (last + 1) * width <= columns[0] or first * width >= columns[0] + columns[1]:
        return None
    whole = rows[0] % height == rows[1] % height == 0
    kept = whole and columns == (first * width, (last - first + 1) * width)
    groups = last - first + 1 if kept else 1

    def compute() -> Weights:
        weight, bias = affine.weights()
        if not kept:
            weight = kernels.regroup(weight, affine.groups, 1)[:, columns[0] : columns[0] + columns[1]]
        weight = weight[rows[0] : rows[0] + rows[1]]
        return weight, None if bias is None else bias[rows[0] : rows[0] + rows[1]]

    return replace(
        affine,
        in_channels=columns[1],
        out_channels=rows[1],
        groups=groups,
        compute=rounded(compute),
        stored=None,
    )
