"""VGG: torchvision's and the paper's figures; conversion folds the batch norms."""

from __future__ import annotations

import pytest
from counting_nets import TABLES_WITHIN, assert_converts, conv, linear, macs, on_meta, parameters, planned

from rmfx import models
from rmfx.errors import UnsupportedModelError
from rmfx.models import vgg, vgg16, vgg16_cifar

LAYERS = [*[64] * 2, *[128] * 2, *[256] * 3, *[512] * 6]


def convs(widths: list[int]) -> int:
    """Parameters of a chain of 3x3 convs of an image."""
    return sum(conv(c_in, c_out, 3) for c_in, c_out in zip([3, *widths], widths, strict=False))


@pytest.mark.parametrize(("name", "biases"), [("vgg16", 0), ("vgg16_bn", sum(LAYERS))])
def test_parameters_are_those_of_torchvision(name: str, biases: int) -> None:
    torchvision = pytest.importorskip("torchvision")
    ours, theirs = (on_meta(getattr(source, name)) for source in (models, torchvision.models))
    assert parameters(ours) + biases / 1e6 == pytest.approx(parameters(theirs))  # a bias before a norm does nothing
    assert macs(ours, 224) == macs(theirs, 224)
    classifier = linear(512 * 7 * 7, 4096) + linear(4096, 4096) + linear(4096, 1000)
    assert planned(getattr(models, name), 224).totals.params_after == convs(LAYERS) + classifier


def test_vgg_16_of_table_1() -> None:
    net = on_meta(vgg16)
    assert parameters(net) == pytest.approx(138, rel=TABLES_WITHIN)
    assert macs(net, 224) == pytest.approx(15.48, rel=TABLES_WITHIN)


def test_plain_parameters_for_cifar_follow_from_the_channels() -> None:
    assert planned(vgg16_cifar, 32).totals.params_after == convs(LAYERS) + linear(512, 10)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("hidden", [None, 8])
def test_small_networks_convert_exactly(batch_norm: bool, hidden: int | None) -> None:
    net = vgg((2, 1), widths=(4, 6), hidden=hidden, batch_norm=batch_norm, num_classes=10)
    classifier = linear(6, 10) if hidden is None else linear(6 * 49, 8) + linear(8, 8) + linear(8, 10)
    assert_converts(net, convs([4, 4, 6]) + classifier)


def test_impossible_networks_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="vgg: depths must be 5 positive block counts, got .1, 1."):
        vgg((1, 1))
    with pytest.raises(UnsupportedModelError, match="vgg: hidden must be positive, got 0"):
        vgg((1, 1), widths=(4, 6), hidden=0)
