"""Fewer channels of a map: groups stay equally wide, and what constants contribute finds a home."""

from __future__ import annotations

import pytest
import torch

from rmfx.algebra.affine import from_tensors
from rmfx.algebra.grid import Grid
from rmfx.algebra.select import select_groups, select_inputs, select_outputs
from rmfx.errors import InexactError

FLOAT64 = torch.float64


def test_select_keeps_groups_equally_wide() -> None:
    grouped = from_tensors(torch.ones(4, 2), None, Grid(), groups=2)
    for select in (select_outputs, lambda affine, kept: select_inputs(affine, kept, torch.zeros(4))):
        for kept in ([0, 1, 2], [0, 1], []):
            with pytest.raises(InexactError, match="groups must stay equally wide"):
                select(grouped, torch.tensor(kept, dtype=torch.long))


def test_whole_groups_go_with_their_inputs_and_outputs() -> None:
    weight = torch.arange(12.0).reshape(6, 2)
    narrow = select_groups(from_tensors(weight, torch.arange(6.0), Grid(), groups=3), torch.tensor([0, 2]))
    assert (narrow.in_channels, narrow.out_channels, narrow.groups) == (4, 4, 2)
    kept, bias = narrow.weights()
    assert bias is not None and bias.tolist() == [0, 1, 4, 5] and torch.equal(kept, weight[[0, 1, 4, 5]].double())


def test_a_constant_needs_a_home_under_zero_padding() -> None:
    affine = from_tensors(torch.ones(1, 3, 3), None, Grid.of((3,), padding=(1,)))
    constants = torch.tensor([0.0, 2.0, 0.0], dtype=FLOAT64)
    with pytest.raises(InexactError, match="zero padding would see 0 where a constant channel that is dropped should"):
        select_inputs(affine, torch.tensor([0, 2]), constants)
    moved = select_inputs(affine, torch.tensor([0, 2]), torch.tensor([0.0, 2.0, 4.0], dtype=FLOAT64))
    assert not moved.has_bias and moved.weights()[0].flatten().tolist() == [1.0] * 3 + [1.5] * 3
