"""Maps side by side: a block matrix of linear maps as one map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rmfx.algebra import kernels
from rmfx.algebra.affine import Affine, Weights
from rmfx.algebra.grid import align
from rmfx.errors import InexactError


@dataclass(frozen=True, eq=False)
class Block:
    """One map inside a stacked one: from channels ``columns`` to channels ``rows`` (positions, in order)."""

    affine: Affine
    rows: Tensor
    columns: Tensor


def stack(blocks: Sequence[Block], in_channels: int, out_channels: int, groups: int = 1) -> Affine:
    """A block matrix of maps as one map; the output size is that of ``blocks[0]``.

    No two blocks may share both a row and a column (add those first). Rows and columns that no block covers
    are dead: zero weights, zero bias.

    Raises:
        InexactError: when grids cannot be shared, or a weight falls outside its group.
    """
    grid, embeddings = align([block.affine.grid for block in blocks])
    height, width = out_channels // groups, in_channels // groups
    places = [(block.rows, _columns(block, height, width)) for block in blocks]
    has_bias = any(block.affine.has_bias for block in blocks)

    def compute(dtype: torch.dtype) -> Weights:
        weight = torch.zeros(out_channels, width, *grid.kernel, dtype=dtype)
        bias = torch.zeros(out_channels, dtype=torch.float64) if has_bias else None
        for block, (rows, columns), where in zip(blocks, places, embeddings, strict=True):
            w, b = block.affine.compute(dtype)
            kernels.place_block(weight, w, rows, columns, where.slices(block.affine.grid.kernel))
            if bias is not None and b is not None:
                bias[rows] += b
        return weight, bias

    sources = frozenset().union(*(block.affine.sources for block in blocks))
    return Affine(in_channels, out_channels, groups, grid, has_bias, compute, sources)


def _columns(block: Block, height: int, width: int) -> Tensor:
    """Column within its group of each weight of ``block``: ``[out or 1, in/groups]`` of the block's own shape."""
    affine = block.affine
    own = torch.arange(affine.in_channels).reshape(affine.groups, -1)
    groups = block.rows // height
    if affine.groups == 1 and bool((groups == groups[0]).all()):
        groups = groups[:1]  # every row reads the same columns
    else:
        own = own.repeat_interleave(affine.out_channels // affine.groups, 0)
    columns = block.columns[own] - (groups * width)[:, None]
    if bool(((columns < 0) | (columns >= width)).any()):
        raise InexactError("a weight falls outside its group")
    return columns
