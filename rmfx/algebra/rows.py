"""What single rows of a linear map read: the Dirac filters of carried channels, found in finished weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rmfx.algebra.affine import Affine
from rmfx.algebra.grid import Grid

_NONE = -1


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a map, in exact comparisons of its weights; all are ``[out]``.

    Attributes:
        column: the channel that a row reads by one tap at offset 0 and nothing else, or -1.
        partner: the second channel, where a row reads ``factor * (x[column] - x[partner])``, or -1.
        factor: that tap's weight; 0 where there is no ``column``.
        alone: rows that read one channel, by any taps.
        zero: rows without weights.
        positive: rows without weights below 0.
        bias: of each row; 0 where there is none.
    """

    column: Tensor
    partner: Tensor
    factor: Tensor
    alone: Tensor
    zero: Tensor
    positive: Tensor
    bias: Tensor

    @property
    def carrying(self) -> bool:
        """Whether any row could carry a channel."""
        return bool((self.column >= 0).any())


def centre_tap(grid: Grid) -> int | None:
    """The tap at offset 0 of a map that keeps sizes (but for its stride), or ``None``.

    >>> centre_tap(Grid.of((3, 3), padding=(1, 1))), centre_tap(Grid.of((3,)))
    (4, None)
    """
    index = 0
    for axis in grid.axes:
        tap, between = divmod(axis.before, axis.dilation)
        if axis.excess or between or not 0 <= tap < axis.kernel:
            return None
        index = index * axis.kernel + tap
    return index


def read_rows(affine: Affine) -> Rows:
    """The rows of ``affine``; reads its weights, in float64.

    >>> from rmfx.algebra.affine import from_tensors
    >>> rows = read_rows(from_tensors(torch.tensor([[0.0, 1.0], [2.0, -2.0], [3.0, 4.0]]), None, Grid()))
    >>> rows.column.tolist(), rows.partner.tolist(), rows.factor.tolist()
    ([1, 0, -1], [-1, 1, -1], [1.0, 2.0, 0.0])
    """
    weight, bias = affine.weights()
    weight = weight.reshape(affine.out_channels, affine.in_channels // affine.groups, affine.grid.taps)
    used = weight != 0
    taps, channels = used.sum((1, 2)), used.any(2)
    centre = centre_tap(affine.grid)
    values = weight.new_zeros(weight.shape[:2]) if centre is None else weight[:, :, centre]
    central = (values != 0).sum(1) == taps
    first = channels.int().argmax(1)
    second = channels.scatter(1, first[:, None], False).int().argmax(1)
    x, y = values.gather(1, first[:, None])[:, 0], values.gather(1, second[:, None])[:, 0]
    pair = central & (taps == 2) & (x == -y)
    found = (central & (taps == 1)) | pair
    base = torch.arange(affine.out_channels) // (affine.out_channels // affine.groups) * weight.shape[1]
    return Rows(
        torch.where(found, first + base, _NONE),
        torch.where(pair, second + base, _NONE),
        torch.where(found, x, 0.0),
        channels.sum(1) == 1,
        taps == 0,
        (weight >= 0).flatten(1).all(1),
        torch.zeros(affine.out_channels, dtype=torch.float64) if bias is None else bias,
    )


def columns_read(affine: Affine, rows: Tensor) -> Tensor:
    """The channels that any of ``rows`` (bool ``[out]``) reads, bool ``[in]``.

    >>> from rmfx.algebra.affine import from_tensors
    >>> columns_read(from_tensors(torch.eye(3), None, Grid()), torch.tensor([True, False, True])).tolist()
    [True, False, True]
    """
    weight, _ = affine.weights()
    used = (weight != 0).reshape(affine.groups, affine.out_channels // affine.groups, weight.shape[1], affine.grid.taps)
    return (used.any(3) & rows.reshape(affine.groups, -1, 1)).any(1).reshape(-1)


def is_power_of_two(values: Tensor) -> Tensor:
    """Which values are ``2 ** n`` or ``-2 ** n``: a product with them is never rounded.

    >>> is_power_of_two(torch.tensor([1.0, -0.5, 3.0, 0.0])).tolist()
    [True, True, False, False]
    """
    return torch.frexp(values.abs())[0] == 0.5


def negated_rows(affine: Affine) -> list[tuple[int, int]]:
    """Pairs of rows of which one is the other times -1, weights and bias.

    >>> from rmfx.algebra.affine import from_tensors
    >>> conv = from_tensors(torch.tensor([[1.0, 2.0], [0.0, 3.0], [-1.0, -2.0]]), None, Grid())
    >>> negated_rows(conv)
    [(0, 2)]
    """
    weight, bias = affine.weights()
    rows = weight.flatten(1)
    if bias is not None:
        rows = torch.cat([rows, bias[:, None]], 1)
    random = torch.Generator().manual_seed(0)
    keys = (rows * torch.rand(rows.shape[1], dtype=torch.float64, generator=random)).sum(1).tolist()
    height = affine.out_channels // affine.groups
    waiting: dict[tuple[int, float], list[int]] = {}
    pairs = []
    for row, key in enumerate(keys):
        if not key:
            continue
        others = waiting.get((row // height, -key), [])
        match = next((other for other in others if torch.equal(rows[other], -rows[row])), None)
        if match is None:
            waiting.setdefault((row // height, key), []).append(row)
        else:
            others.remove(match)
            pairs.append((match, row))
    return pairs
