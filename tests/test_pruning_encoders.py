"""Pruning of networks with layers that rmfx only lets through: they stay, and all around them is pruned and counted."""

from __future__ import annotations

import torch
from oracle import assert_equivalent
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rmfx
from rmfx.pruning.prune import Width, prune


class Upsampling(nn.Module):
    """A U-Net whose decoder has transposed convolutions, as a layer and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1)
        self.up, self.weight = nn.ConvTranspose2d(16, 12, 4, 2, 1, groups=2), nn.Parameter(torch.randn(12, 3, 3, 3))
        self.deep, self.head = nn.Conv2d(20, 16, 3, padding=1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        up = torch.relu(self.up(torch.relu(self.down(x))))
        up = nn.functional.conv_transpose2d(up, self.weight, padding=1, groups=4)
        return self.head(torch.relu(self.deep(torch.cat([x, up], 1))))


def flops(network: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    return counter.get_total_flops()


def test_transposed_convolutions_cost_something() -> None:
    torch.manual_seed(0)
    model, x = Upsampling().eval(), torch.randn(1, 3, 16, 16)
    pruned = prune(model, x, budget={"macs": 0.8}, importance="l2")
    assert pruned.macs == (flops(model, x) // 2, flops(pruned.network, x) // 2)
    assert 0.7 * pruned.macs[0] < pruned.macs[1] <= 0.8 * pruned.macs[0]
    assert rmfx.report(rmfx.convert(model, x)).totals.macs_before == pruned.macs[0]


def test_what_stands_beside_something_unknown_is_pruned() -> None:
    torch.manual_seed(0)
    model = Upsampling().double().eval()
    with torch.no_grad():
        model.first.weight[::2] = 0
    x = 8 * torch.randn(2, 3, 16, 16, dtype=torch.float64)
    pruned = prune(model, x, threshold=1e-9, importance="l2")
    assert_equivalent(model, pruned.network, x)
    assert pruned.widths == (Width("first", 8, 5, constants=1), Width("deep", 16, 16))
    assert pruned.fixed["down"] == "up (ConvTranspose2d) does not treat channels one by one"
