"""Fewer channels of a map: groups stay equally wide, and what constants contribute finds a home."""

from __future__ import annotations

import pytest
import torch

from rmfx.algebra.affine import from_tensors
from rmfx.algebra.grid import Grid
from rmfx.algebra.select import select_channels, select_inputs, select_outputs
from rmfx.errors import InexactError

FLOAT64 = torch.float64


def test_select_keeps_groups_equally_wide() -> None:
    grouped = from_tensors(torch.ones(4, 2), None, Grid(), groups=2)
    for select in (select_outputs, lambda affine, kept: select_inputs(affine, kept, torch.zeros(4))):
        for kept in ([0, 1, 2], [0, 1], []):
            with pytest.raises(InexactError, match="groups must stay equally wide"):
                select(grouped, torch.tensor(kept, dtype=torch.long))
    with pytest.raises(InexactError, match="only a depthwise map has the same channels before and after it"):
        select_channels(grouped, torch.tensor([0]))


def test_a_constant_needs_a_home_under_zero_padding() -> None:
    affine = from_tensors(torch.ones(1, 3, 3), None, Grid.of((3,), padding=(1,)))
    constants = torch.tensor([0.0, 2.0, 0.0], dtype=FLOAT64)
    with pytest.raises(InexactError, match="zero padding would see 0 where a constant channel that is dropped should"):
        select_inputs(affine, torch.tensor([0, 2]), constants)
    moved = select_inputs(affine, torch.tensor([0, 2]), torch.tensor([0.0, 2.0, 4.0], dtype=FLOAT64))
    assert not moved.has_bias and moved.weights()[0].flatten().tolist() == [1.0] * 3 + [1.5] * 3
