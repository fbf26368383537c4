"""Pre-activation ResNet: published figures, and the plain form by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from counting_nets import assert_converts, conv, linear, on_meta, parameters, planned
from torch import nn

from rmfx import models
from rmfx.errors import UnsupportedModelError
from rmfx.models import preact_resnet

WIDTHS = (64, 128, 256, 512)
CIFAR_WIDTHS = (16, 32, 64)
UNKNOWN: Any = "other"  # a stem or shortcut that does not exist


def plain_parameters(
    depths: Sequence[int], widths: Sequence[int], bottleneck: bool, stem: int = 3, classes: int = 10
) -> int:
    """Of the plain form, where a block's ``c`` input channels are carried through it.

    A block whose shape changes, or which is the first, begins activated: its stream is not negative, and as in ResNet.
    Another needs its stream raw and normalised, 2c channels, from a 1x1 conv that is depthwise where the layer behind
    is dense; PReLUs let the raw ones pass. The conv in front of that layer has nothing folded into it, and no bias.
    """
    c = widths[0]
    total = conv(3, c, stem)
    for width, depth in zip(widths, depths, strict=True):
        for j in range(depth):
            raw = j > 0  # the block's input is neither activated by the stem nor before a projection
            bias = j == depth - 1
            if bottleneck:
                inner, out = width + c, 4 * width
                total += conv(c, 2 * c, groups=c) + 2 * c + conv(2 * c, inner) + 2 * inner if raw else conv(c, inner)
                total += conv(inner, inner, 3, inner // width) + conv(inner, out, bias=bias)
            else:
                inner, out = width + c, width
                if raw:
                    total += conv(c, inner) + inner + conv(inner, inner, 3, groups=2) + inner
                else:
                    total += conv(c, inner, 3)
                total += conv(inner, out, 3, bias=bias)
            c = out
    return total + linear(c, classes)


@pytest.mark.parametrize(("name", "millions"), [("110", 1.7), ("164", 1.7), ("1001", 10.2)])
def test_parameters_are_those_published(name: str, millions: float) -> None:
    assert parameters(on_meta(getattr(models, f"preact_resnet{name}"))) == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("depth", [18, 50])
def test_imagenet_forms_have_nearly_the_parameters_of_resnet(depth: int) -> None:
    ours, resnet = (on_meta(getattr(models, f"{kind}resnet{depth}")) for kind in ("preact_", ""))
    assert parameters(ours) == pytest.approx(parameters(resnet), rel=0.001)  # batch norms of other widths


@pytest.mark.parametrize(("depth", "bottleneck"), [(20, False), (110, False), (164, True)])
def test_plain_parameters_follow_from_the_channels(depth: int, bottleneck: bool) -> None:
    n = (depth - 2) // (9 if bottleneck else 6)
    report = planned(getattr(models, f"preact_resnet{depth}"), 32)
    assert report.count("removed") == 3 * n
    assert report.totals.params_after == plain_parameters([n] * 3, CIFAR_WIDTHS, bottleneck)


@pytest.mark.parametrize(("depth", "depths"), [(18, (2, 2, 2, 2)), (50, (3, 4, 6, 3))])
def test_plain_parameters_of_imagenet_forms_follow_from_the_channels(depth: int, depths: Sequence[int]) -> None:
    report = planned(getattr(models, f"preact_resnet{depth}"), 224)
    assert report.totals.params_after == plain_parameters(depths, WIDTHS, depth == 50, 7, 1000)


@pytest.mark.parametrize(("depth", "bottleneck"), [(20, False), (29, True)])
def test_small_networks_convert_exactly(depth: int, bottleneck: bool) -> None:
    net = preact_resnet(depth, bottleneck=bottleneck, widths=(4, 8, 16))
    assert_converts(net, plain_parameters([3] * 3, (4, 8, 16), bottleneck), sums=9)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: preact_resnet(21), r"preact_resnet: depth must be 6n \+ 2 with n at least 1, got 21"),
        (lambda: preact_resnet(26, bottleneck=True), r"depth must be 9n \+ 2 with n at least 1, got 26"),
        (lambda: preact_resnet(8, widths=(4, 0, 8)), "preact_resnet: widths must be positive, got 0"),
        (lambda: models.preact_resnet18(stem=UNKNOWN), "preact_resnet: stem must be 'imagenet' or 'cifar'"),
        (lambda: models.preact_resnet50(-1), "preact_resnet: num_classes must be positive, got -1"),
    ],
)
def test_impossible_networks_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        build()
