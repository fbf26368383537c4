"""Channels that say nothing go, and nothing changes: also those that are constant here and unread there."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_equivalent, relative_difference
from torch import Tensor, fx, nn

from rmfx.hostile import randomise
from rmfx.pruning.coupling import Coupling
from rmfx.pruning.prune import prune


def at_random(gm: fx.GraphModule, coupling: Coupling) -> Tensor:
    """Scores above the threshold: what goes is what rmfx says is dead or constant."""
    return torch.rand(coupling.count, dtype=torch.float64) + 0.5


def with_zeros(model: nn.Module) -> nn.Module:
    """A tenth of the filters, of the scales of norms and of the columns that read them are set to 0."""
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, nn.Parameter):
            weight.data[torch.rand(len(weight)) < 0.1] = 0
            if weight.dim() > 1 and getattr(layer, "groups", 1) == 1:
                weight.data[:, torch.rand(weight.shape[1]) < 0.1] = 0
    return model


class Block(nn.Module):
    """A residual block of which channel 1 is constant for its branch, and unread behind the sum."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.c1, self.c2 = nn.Conv2d(4, 4, 3, padding=padding), nn.Conv2d(4, 4, 3, padding=2 - padding)
        self.head = nn.Conv2d(4, 2, 1)
        self.double().eval()
        with torch.no_grad():
            self.stem.weight[1], self.stem.bias[1] = 0, 3  # emits relu(bn(3)), not the relu(0) of a norm without scale
            self.head.weight[:, 1] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        return self.head(x + self.c2(torch.relu(self.c1(x))))


@pytest.mark.parametrize("padding", [0, 1])
def test_a_channel_that_is_constant_here_and_unread_there(padding: int) -> None:
    model, x = Block(padding), 8 * torch.randn(2, 3, 12, 12, dtype=torch.float64)
    pruned = prune(model, x, threshold=1e-9, importance="l2")
    assert_equivalent(model, pruned.network, x)
    width = pruned.widths[0]
    assert (width.layer, width.before, width.after, width.constants) == ("stem", 4, 3 + padding, padding)


def test_a_network_of_torchvision_with_zeros() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model = randomise(torchvision.models.mobilenet_v3_small(weights=None).double().eval(), x, 0)
    pruned = prune(with_zeros(model), x, threshold=1e-9, importance=at_random)
    with torch.no_grad():
        expected = model(x)
        assert relative_difference(expected[0], expected[1]) > 1e-3, "not all of it is constant"
        assert relative_difference(expected, pruned.network(x)) < 1e-12
    assert pruned.macs[1] < pruned.macs[0] and pruned.lost == 0
