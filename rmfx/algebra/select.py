"""Fewer channels: the part of a map on chosen channels, with what the others contribute where they are constant."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rmfx.algebra.affine import Affine, Weights, rounded
from rmfx.algebra.bounds import padding_taps
from rmfx.errors import InexactError


def select_outputs(affine: Affine, kept: Tensor) -> Affine:
    """The map to the output channels ``kept`` (sorted), as many of every group.

    >>> from rmfx.algebra.affine import from_tensors
    >>> from rmfx.algebra.grid import Grid
    >>> select_outputs(from_tensors(torch.eye(3), None, Grid()), torch.tensor([0, 2])).weights()[0].tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    _columns(kept, affine.out_channels, affine.groups)

    def compute() -> Weights:
        weight, bias = affine.weights()
        return weight[kept], None if bias is None else bias[kept]

    return replace(affine, out_channels=len(kept), compute=rounded(compute), stored=None)


def select_groups(affine: Affine, kept: Tensor) -> Affine:
    """The map made of the groups ``kept`` (sorted): of a depthwise one, that on those channels only.

    >>> from rmfx.algebra.affine import from_tensors
    >>> from rmfx.algebra.grid import Grid
    >>> narrow = select_groups(from_tensors(torch.arange(4.0)[:, None], None, Grid(), groups=2), torch.tensor([1]))
    >>> narrow.in_channels, narrow.weights()[0].flatten().tolist()
    (1, [2.0, 3.0])
    """
    width, height = (channels // affine.groups for channels in (affine.in_channels, affine.out_channels))
    rows = (kept[:, None] * height + torch.arange(height)).reshape(-1)

    def compute() -> Weights:
        weight, bias = affine.weights()
        return weight[rows], None if bias is None else bias[rows]

    narrow = replace(affine, in_channels=width * len(kept), out_channels=len(rows), groups=len(kept))
    return replace(narrow, compute=rounded(compute), stored=None)


def without_weights(affine: Affine, rows: Tensor) -> Affine:
    """The map whose outputs ``rows`` (bool ``[out]``) are their biases alone."""

    def compute() -> Weights:
        weight, bias = affine.weights()
        return torch.where(rows.reshape(-1, *[1] * (weight.dim() - 1)), 0.0, weight), bias

    return replace(affine, compute=rounded(compute), stored=None)


def select_inputs(affine: Affine, kept: Tensor, constants: Tensor) -> Affine:
    """The map that reads the channels ``kept`` (sorted, as many of every group) and no others.

    A channel that is not kept must be dead (all its weights 0) or the constant that ``constants`` (``[in]``) names. A
    constant goes into the bias, ``b + W_c * v_c``, where no tap reads zero padding. Else it goes to another constant
    channel ``d`` of its group that is kept, ``W_d + W_c * v_c / v_d``: both have the same border.

    Raises:
        InexactError: when a constant that is not 0 has no such channel, or groups would differ in width.
    """
    width = affine.in_channels // affine.groups
    columns = _columns(kept, affine.in_channels, affine.groups)
    dropped = torch.ones(affine.in_channels, dtype=torch.bool).index_fill(0, kept, False)
    values = torch.where(dropped, constants, 0.0)
    homes = torch.where(dropped, 0.0, constants).reshape(affine.groups, width)
    home = homes.abs().argmax(1)
    to_home = bool(values.any()) and bool(padding_taps(affine.grid).any())
    if to_home:
        homeless = (homes == 0).all(1) & (values.reshape(affine.groups, width) != 0).any(1)
        if bool(homeless.any()):
            raise InexactError("zero padding would see 0 where a constant channel that is dropped should stand")

    def compute() -> Weights:
        weight, bias = affine.weights()
        grouped = weight.reshape(affine.groups, affine.out_channels // affine.groups, width, -1).clone()
        parts = torch.einsum("goit,gi->got", grouped, values.reshape(affine.groups, width))
        group = torch.arange(affine.groups)
        if to_home:
            sizes = homes[group, home]
            grouped[group, :, home] += parts / torch.where(sizes == 0, 1.0, sizes)[:, None, None]
        elif bool(values.any()):
            constant = parts.sum(2).reshape(-1)
            bias = constant if bias is None else bias + constant
        reduced = grouped[group[:, None], :, columns].transpose(1, 2)
        return reduced.reshape(affine.out_channels, -1, *weight.shape[2:]), bias

    has_bias = affine.has_bias or (bool(values.any()) and not to_home)
    return replace(affine, in_channels=len(kept), compute=rounded(compute), has_bias=has_bias, stored=None)


def _columns(kept: Tensor, channels: int, groups: int) -> Tensor:
    """``kept`` channels as columns within their groups, ``[groups, kept per group]``."""
    width = channels // groups
    counts = torch.bincount(kept // width, minlength=groups)
    if not len(kept) or bool((counts != counts[0]).any()):
        raise InexactError("groups must stay equally wide")
    return (kept % width).reshape(groups, -1)
