"""ResNet for ImageNet and for CIFAR: torchvision's and the paper's figures, and the plain form by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from counting_nets import TABLES_WITHIN, assert_converts, conv, linear, macs, on_meta, parameters, planned
from oracle import assert_equivalent
from torch import nn

import rmfx
from rmfx import models
from rmfx.errors import UnsupportedModelError
from rmfx.hostile import randomise
from rmfx.models import cifar_resnet, resnet

WIDTHS = (64, 128, 256, 512)
DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}
UNKNOWN: Any = "other"  # a stem or shortcut that does not exist


def plain_parameters(
    depths: Sequence[int], widths: Sequence[int], bottleneck: bool = False, stem: int = 7, classes: int = 1000
) -> int:
    """Of the plain form: a block's ``c`` input channels are carried through it (the paper's Figures 1 and 2b)."""
    c = widths[0]
    total = conv(3, c, stem)
    for width, depth in zip(widths, depths, strict=True):
        for _ in range(depth):
            inner = width + c
            if bottleneck:  # the 3x3 conv keeps its groups of ``width``: the carried channels are more of them
                total += conv(c, inner) + conv(inner, inner, 3, inner // width) + conv(inner, 4 * width)
                c = 4 * width
            else:
                total += conv(c, inner, 3) + conv(inner, width, 3)
                c = width
    return total + linear(c, classes)


@pytest.mark.parametrize("name", DEPTHS)
def test_parameters_are_those_of_torchvision(name: str) -> None:
    torchvision = pytest.importorskip("torchvision")
    ours, theirs = (on_meta(getattr(source, name)) for source in (models, torchvision.models))
    assert parameters(ours) == parameters(theirs)
    assert macs(ours, 224) == macs(theirs, 224)


@pytest.mark.parametrize("name", DEPTHS)
def test_plain_parameters_follow_from_the_channels(name: str) -> None:
    bottleneck = int(name.removeprefix("resnet")) >= 50
    report = planned(getattr(models, name), 224)
    assert report.count("removed") == sum(DEPTHS[name])
    assert report.totals.params_after == plain_parameters(DEPTHS[name], WIDTHS, bottleneck)


def test_resnet_34_of_table_1() -> None:
    net = on_meta(models.resnet34_cifar)
    assert parameters(net) == pytest.approx(21.2, rel=TABLES_WITHIN)
    assert parameters(on_meta(lambda: models.resnet34_cifar(100))) == pytest.approx(21.3, rel=TABLES_WITHIN)
    assert macs(net, 32) == pytest.approx(1.16, rel=TABLES_WITHIN)
    after = planned(models.resnet34_cifar, 32).totals.params_after
    assert after == plain_parameters(DEPTHS["resnet34"], WIDTHS, stem=3, classes=10)


@pytest.mark.parametrize(
    ("bottleneck", "stem", "sums"), [(False, "cifar", 5), (False, "imagenet", 5), (True, "cifar", 5)]
)
def test_small_resnets_convert_exactly(bottleneck: bool, stem: Any, sums: int) -> None:
    depths, widths = (1, 2, 1, 1), (4, 8, 16, 32)
    net = resnet(depths, widths=widths, bottleneck=bottleneck, stem=stem, num_classes=10)
    expected = plain_parameters(depths, widths, bottleneck, 3 if stem == "cifar" else 7, 10)
    assert_converts(net, expected, size=16 if stem == "cifar" else 64, sums=sums)


CIFAR_MILLIONS = [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7), (1202, 19.4)]


@pytest.mark.parametrize(("depth", "millions"), CIFAR_MILLIONS)
def test_cifar_resnets_have_the_published_parameters(depth: int, millions: float) -> None:
    net = on_meta(getattr(models, f"resnet{depth}"))
    assert parameters(net) == pytest.approx(millions, rel=0.02)  # published with two digits
    assert sum(isinstance(layer, nn.Conv2d) for layer in net.modules()) == depth - 1


@pytest.mark.slow
@pytest.mark.parametrize("depth", [20, 56, 110])
@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_plain_parameters_of_cifar_resnets_follow_from_the_channels(depth: int, shortcut: Any) -> None:
    n = (depth - 2) // 6
    report = planned(lambda: cifar_resnet(depth, shortcut=shortcut), 32)
    assert report.count("removed") == 3 * n
    assert report.totals.params_after == plain_parameters((n, n, n), (16, 32, 64), stem=3, classes=10)


@pytest.mark.parametrize("shortcut", ["pad", "conv"])
def test_small_cifar_resnets_convert_exactly(shortcut: Any) -> None:
    net = cifar_resnet(14, widths=(4, 6, 10), shortcut=shortcut)
    assert_converts(net, plain_parameters((2, 2, 2), (4, 6, 10), stem=3, classes=10), sums=6)


def test_exported_cifar_resnets_convert_exactly() -> None:
    x = torch.randn(2, 3, 33, 33, dtype=torch.float64) * 8
    net = randomise(cifar_resnet(14, widths=(4, 6, 10)).double(), x)
    plain = rmfx.convert(torch.export.export(net, (x,)))
    assert rmfx.report(plain).count("removed") == 6
    assert_equivalent(net, plain, x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: resnet((1, 1, 1)), "resnet: depths must be 4 positive block counts, got .1, 1, 1."),
        (lambda: resnet((1, 0, 1, 1)), "depths must be 4 positive block counts"),
        (lambda: resnet((1, 1), widths=(8, 0)), "resnet: widths must be positive, got 0"),
        (lambda: models.resnet18(stem=UNKNOWN), "resnet: stem must be 'imagenet' or 'cifar', got 'other'"),
        (lambda: models.resnet18(0), "resnet: num_classes must be positive, got 0"),
        (lambda: cifar_resnet(21), r"cifar_resnet: depth must be 6n \+ 2 with n at least 1, got 21"),
        (lambda: cifar_resnet(2), r"depth must be 6n \+ 2 with n at least 1, got 2"),
        (lambda: cifar_resnet(8, shortcut=UNKNOWN), "shortcut must be 'pad' or 'conv', got 'other'"),
        (lambda: cifar_resnet(8, in_channels=0), "cifar_resnet: in_channels must be positive, got 0"),
    ],
)
def test_impossible_networks_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        build()
