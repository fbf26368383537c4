"""Blocks of published networks whose regions are no two chains: gates, slices, concats, pools, sums inside of sums.

Each is small, behind no stem, and takes signed images. ``BLOCKS`` says of each how many residual sums there are, and
how many of them go.
"""

from __future__ import annotations

from block import Block, SqueezeExcite, net
from blocks_gates import GATES, EfficientChannelAttention
from blocks_slices import SLICES
from blocks_sums import SUMS

__all__ = ["BLOCKS", "GATES", "SLICES", "SUMS", "Block", "EfficientChannelAttention", "SqueezeExcite", "net"]

BLOCKS: dict[str, Block] = {
    **{f"gate: {name}": block for name, block in GATES.items()},
    **{f"slice: {name}": block for name, block in SLICES.items()},
    **{f"sum: {name}": block for name, block in SUMS.items()},
}
