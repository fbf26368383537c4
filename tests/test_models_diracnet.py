"""DiracNet: its weights, the paper's figures, and the plain form by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from counting_nets import TABLES_WITHIN, assert_converts, conv, linear, planned
from torch import nn

from rmfx.errors import UnsupportedModelError
from rmfx.models import diracnet, diracnet18, diracnet34, diracnet34_cifar
from rmfx.models.diracnet import DiracConv2d

WIDTHS = (64, 128, 256, 512)


def plain_parameters(depths: Sequence[int], widths: Sequence[int], stem: int, classes: int) -> int:
    """Of the plain form: two convs with bias for each of ``depths``."""
    c = widths[0]
    total = conv(3, c, stem)
    for width, depth in zip(widths, depths, strict=True):
        for _ in range(2 * depth):
            total += conv(c, width, 3)
            c = width
    return total + linear(c, classes)


def test_a_conv_of_no_weight_copies_its_input() -> None:
    layer = DiracConv2d(4, 6)
    nn.init.zeros_(layer.b)
    x = torch.randn(2, 4, 7, 9)
    with torch.no_grad():
        out = layer(x)
    assert torch.equal(out, torch.cat((x, torch.zeros(2, 2, 7, 9)), 1))


def test_the_scale_of_a_filter_is_b_alone() -> None:
    layer = DiracConv2d(4, 6)
    x = torch.randn(2, 4, 7, 9)
    with torch.no_grad():
        out = layer(x)
        layer.weight.mul_(3)
        torch.testing.assert_close(layer(x), out)
        layer.b.mul_(2)
        assert not torch.allclose(layer(x), out)


@pytest.mark.parametrize(
    ("build", "size", "depths", "millions", "giga_macs"),
    [
        (diracnet18, 224, (2, 2, 2, 2), 11.5, None),
        (diracnet34, 224, (3, 4, 6, 3), 21.6, None),
        (diracnet34_cifar, 32, (3, 4, 6, 3), 21.1, 1.15),
    ],
)
def test_plain_forms_have_the_published_figures_and_follow_from_the_channels(
    build: Callable[[], nn.Module], size: int, depths: Sequence[int], millions: float, giga_macs: float | None
) -> None:
    totals = planned(build, size).totals
    small = size == 32
    assert totals.params_after == plain_parameters(depths, WIDTHS, 3 if small else 7, 10 if small else 1000)
    assert totals.params_after / 1e6 == pytest.approx(millions, rel=TABLES_WITHIN)
    assert totals.macs_after is not None
    assert giga_macs is None or totals.macs_after / 1e9 == pytest.approx(giga_macs, rel=TABLES_WITHIN)


@pytest.mark.parametrize(("stem", "kernel", "size"), [("cifar", 3, 16), ("imagenet", 7, 64)])
def test_small_networks_convert_exactly(stem: Any, kernel: int, size: int) -> None:
    depths, widths = (1, 2, 1, 1), (4, 8, 12, 16)
    net = diracnet(depths, widths=widths, stem=stem, num_classes=10)
    random = torch.Generator().manual_seed(1)
    for layer in net.modules():
        if isinstance(layer, DiracConv2d):
            nn.init.normal_(layer.a, generator=random)
            nn.init.normal_(layer.b, generator=random)
    assert_converts(net, plain_parameters(depths, widths, kernel, 10), size=size)


def test_impossible_networks_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="diracnet: depths must be 4 positive block counts"):
        diracnet((1, 1, 1))
    with pytest.raises(UnsupportedModelError, match="diracnet: stem must be 'imagenet' or 'cifar', got 'mnist'"):
        diracnet34(stem="mnist")  # type: ignore[arg-type]
