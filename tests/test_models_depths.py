"""Blocks per stage of a network of given depth, and what all networks share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rmfx.models
from rmfx import zoo
from rmfx.errors import UnsupportedModelError
from rmfx.models.depths import PUBLISHED, stage_depths
from rmfx.models.layers import init_weights


def test_table_1_is_kept() -> None:
    table = {26: (2, 2, 2, 2), 41: (2, 3, 5, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
    assert {depth: stage_depths(depth) for depth in table} == table


@pytest.mark.parametrize("depth", [*range(14, 160, 3), 133])
def test_all_blocks_are_given_out(depth: int) -> None:
    depths = stage_depths(depth)
    assert sum(depths) == (depth - 1) // 3
    assert min(depths) >= 1
    assert sum(depths) in PUBLISHED or max(depths) == depths[2]  # the third stage is the deepest, as in ResNet
    assert stage_depths(depth, layers_per_block=1) == tuple(3 * blocks for blocks in depths)


@pytest.mark.parametrize("depth", [27, 12, 11, 0, -4])
def test_depths_without_a_network_are_refused(depth: int) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"depth must be 3 \* blocks \+ 2 .* got {depth}"):
        stage_depths(depth)


def test_other_blocks_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="layers_per_block must be 1 or 3, got 2"):
        stage_depths(26, layers_per_block=2)


@pytest.mark.parametrize("name", zoo.names("rmfx"))
def test_every_network_takes_its_images(name: str) -> None:
    with torch.device("meta"):
        net = getattr(rmfx.models, name)().eval()
        shape = zoo.input_shape(f"rmfx:{name}", net)
        out = net(torch.zeros(1, *shape))
    assert shape == ((3, 32, 32) if name in rmfx.models.CIFAR else (3, 224, 224))
    assert out.shape == (1, 10 if name in rmfx.models.CIFAR else 1000)


def test_names_are_sorted() -> None:
    assert rmfx.models.__all__ == sorted(rmfx.models.__all__)


@pytest.mark.parametrize(("groups", "deviation"), [(1, 1 / 24), (8, 1 / 24 * 8**0.5), (64, 1 / 3)])
def test_weights_start_with_the_variance_of_their_own_fan_out(groups: int, deviation: float) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 128, 3, groups=groups)
    init_weights(nn.Sequential(layer))
    assert layer.weight.std().item() == pytest.approx(deviation, rel=0.05)
    assert layer.bias is not None and not layer.bias.any()
