"""MobileNets: published figures, and a MobileNetV2 that becomes MobileNetV1 layer for layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from counting_nets import assert_converts, conv, linear, macs, on_meta, parameters, planned
from torch import nn

import rmfx
from rmfx import models
from rmfx.errors import UnsupportedModelError
from rmfx.models import mobilenet_v1, mobilenet_v1_cifar, mobilenet_v1_shaped, mobilenet_v2, mobilenet_v2_cifar

# Howard et al. 2017, Table 1, by hand: outputs of the pointwise convs; the depthwise convs have the channels before.
V1_WIDTHS = [64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
# Sandler et al. 2018, Table 2: expansion, width, blocks.
V2_ROWS = [(1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)]


def plain_v1(classes: int, times: float = 1.0) -> int:
    """Parameters of MobileNetV1 with biases in place of batch norms."""
    c = int(32 * times)
    total = conv(3, c, 3)
    for width in V1_WIDTHS:
        total += conv(c, c, 3, groups=c) + conv(c, int(width * times))
        c = int(width * times)
    return total + linear(c, classes)


def plain_v2(classes: int) -> int:
    """Parameters of the plain MobileNetV2: a residual block's ``c`` channels join the ``6c`` of its depthwise conv."""
    c = 32
    total = conv(3, c, 3)
    for expansion, width, blocks in V2_ROWS:
        for block in range(blocks):
            inner = c * expansion + (c if block > 0 else 0)
            total += conv(c, inner) if expansion > 1 else 0
            total += conv(inner, inner, 3, groups=inner) + conv(inner, width)
            c = width
    return total + conv(c, 1280) + linear(1280, classes)


def test_v1_has_the_published_figures() -> None:
    net = on_meta(mobilenet_v1)
    assert parameters(net) == pytest.approx(4.23, rel=0.001)
    assert macs(net, 224) == pytest.approx(0.569, rel=0.001)
    biases = 32 + sum([32, *V1_WIDTHS[:-1]]) + sum(V1_WIDTHS)  # a batch norm has a scale and a shift for each
    assert sum(p.numel() for p in net.parameters()) == plain_v1(1000) + biases


def test_v2_is_torchvisions() -> None:
    torchvision = pytest.importorskip("torchvision")
    ours, theirs = on_meta(mobilenet_v2), on_meta(torchvision.models.mobilenet_v2)
    assert parameters(ours) == parameters(theirs)
    assert macs(ours, 224) == macs(theirs, 224)


@pytest.mark.parametrize(("build", "size", "classes"), [(mobilenet_v1, 224, 1000), (mobilenet_v1_cifar, 32, 10)])
def test_plain_parameters_of_v1_follow_from_the_channels(
    build: Callable[[], nn.Module], size: int, classes: int
) -> None:
    assert planned(build, size).totals.params_after == plain_v1(classes)


@pytest.mark.parametrize(("build", "size", "classes"), [(mobilenet_v2, 224, 1000), (mobilenet_v2_cifar, 32, 10)])
def test_plain_parameters_of_v2_follow_from_the_channels(
    build: Callable[[], nn.Module], size: int, classes: int
) -> None:
    report = planned(build, size)
    assert report.count("removed") == 10
    assert report.totals.params_after == plain_v2(classes)


def test_small_v1_converts_exactly() -> None:
    assert_converts(mobilenet_v1(10, width_multiple=0.25, stem="cifar"), plain_v1(10, 0.25), size=32)


def test_v2_converts_exactly() -> None:
    assert_converts(mobilenet_v2_cifar(), plain_v2(10), size=16, sums=10)


def shapes(net: nn.Module) -> list[tuple[Any, ...]]:
    """Of all convs, in order of execution."""
    layers = rmfx.to_sequential(net) if isinstance(net, torch.fx.GraphModule) else net
    convs = [layer for layer in layers.modules() if isinstance(layer, nn.Conv2d)]
    return [(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding, c.groups) for c in convs]


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    return rmfx.convert(mobilenet_v1_shaped().eval(), torch.zeros(1, 3, 32, 32), fuse="always", verify=False)


def test_a_v2_becomes_v1_layer_for_layer(converted: nn.Module) -> None:
    plain_names = {"Conv2d", "ReLU", "PReLU", "AdaptiveAvgPool2d", "Flatten", "Linear"}
    assert {type(layer).__name__ for layer in rmfx.to_sequential(converted, strict=True)} == plain_names
    assert shapes(converted) == shapes(mobilenet_v1_cifar())


def test_the_v2_and_its_v1_have_the_figures_of_table_2(converted: nn.Module) -> None:
    assert macs(mobilenet_v1_shaped(), 32) * 1000 == pytest.approx(83.4, rel=0.02)
    assert macs(mobilenet_v1_shaped(100), 32) * 1000 == pytest.approx(83.5, rel=0.02)
    assert macs(converted, 32) == macs(mobilenet_v1_cifar(), 32)
    assert macs(converted, 32) * 1000 == pytest.approx(47.1, rel=0.02)


def slopes(times: float = 1.0) -> int:
    """Parameters of the PReLUs of a converted V2: behind and before each depthwise conv that carries channels."""
    carrying = [int(128 * times), int(256 * times), *[int(512 * times)] * 5, int(1024 * times)]
    return 2 * sum(carrying)


def test_plain_parameters_of_the_v2_are_those_of_v1(converted: nn.Module) -> None:
    assert sum(p.numel() for p in converted.parameters()) == plain_v1(10) + slopes()


def test_small_v2_of_that_shape_converts_exactly() -> None:
    net = mobilenet_v1_shaped(width_multiple=0.25)
    assert_converts(net, plain_v1(10, 0.25) + slopes(0.25), size=32, sums=8, fuse="always")


@pytest.mark.parametrize("network", ["mobilenet_v1", "mobilenet_v2"])
def test_impossible_networks_are_refused(network: str) -> None:
    build = getattr(models, network)
    with pytest.raises(UnsupportedModelError, match=f"{network}: stem must be 'imagenet' or 'cifar', got 'mnist'"):
        build(stem="mnist")
    with pytest.raises(UnsupportedModelError, match=f"{network}: width_multiple must be positive, got 0"):
        build(width_multiple=0)


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="mobilenet_v1_shaped: num_classes must be positive, got 0"):
        mobilenet_v1_shaped(0)
