"""RepVGG: the published and the paper's figures of the plain form, which is one 3x3 conv per block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from counting_nets import TABLES_WITHIN, assert_converts, conv, linear, planned
from torch import nn

from rmfx import models
from rmfx.errors import UnsupportedModelError
from rmfx.models import repvgg, repvgg18, repvgg34, repvgg_a2_cifar, repvgg_by_depth
from rmfx.models.depths import stage_depths

A, B = (2, 4, 14, 1), (4, 6, 16, 1)
# Ding et al. 2021, Tables 2 and 4: layers and widths of the stages, groups, parameters in millions.
PUBLISHED = {
    "repvgg_a0": (A, (48, 96, 192, 1280), 1, 8.30),
    "repvgg_a1": (A, (64, 128, 256, 1280), 1, 12.78),
    "repvgg_a2": (A, (96, 192, 384, 1408), 1, 25.49),
    "repvgg_b0": (B, (64, 128, 256, 1280), 1, 14.33),
    "repvgg_b1": (B, (128, 256, 512, 2048), 1, 51.82),
    "repvgg_b1g2": (B, (128, 256, 512, 2048), 2, 41.36),
    "repvgg_b1g4": (B, (128, 256, 512, 2048), 4, 36.12),
    "repvgg_b2": (B, (160, 320, 640, 2560), 1, 80.31),
    "repvgg_b2g4": (B, (160, 320, 640, 2560), 4, 55.77),
    "repvgg_b2g2": (B, (160, 320, 640, 2560), 2, None),
    "repvgg_b3": (B, (192, 384, 768, 2560), 1, 110.96),
    "repvgg_b3g2": (B, (192, 384, 768, 2560), 2, None),
    "repvgg_b3g4": (B, (192, 384, 768, 2560), 4, 75.62),
}
UNKNOWN: Any = "other"  # a stem or shortcut that does not exist


def plain_parameters(
    depths: Sequence[int], widths: Sequence[int], groups: int = 1, classes: int = 1000, stem: int = 3
) -> int:
    """Of the plain form: one conv with bias per block; layers 2, 4, ... behind the stem are grouped."""
    c, layer = min(64, widths[0]), 0
    total = conv(3, c, stem)
    for width, depth in zip(widths, depths, strict=True):
        for _ in range(depth):
            layer += 1
            total += conv(c, width, 3, groups if layer % 2 == 0 else 1)
            c = width
    return total + linear(c, classes)


@pytest.mark.parametrize("name", PUBLISHED)
def test_plain_parameters_are_those_published_and_follow_from_the_channels(name: str) -> None:
    depths, widths, groups, millions = PUBLISHED[name]
    after = planned(getattr(models, name), 224).totals.params_after
    assert after == plain_parameters(depths, widths, groups)
    assert millions is None or after / 1e6 == pytest.approx(millions, rel=0.0015)


# The paper's Tables 1 and 3: parameters in millions, MACs in thousands of millions.
PAPER = [
    (repvgg18, 224, 11.5, 1.80),
    (repvgg34, 224, 21.6, 3.65),
    (repvgg_a2_cifar, 32, 24.1, 1.67),
    (lambda: repvgg_a2_cifar(100), 32, 24.2, 1.67),
    (models.repvgg_b1, 224, 51.8, 11.82),
    (models.repvgg_b2, 224, 80.3, 18.38),
    (models.repvgg_b3, 224, 111.0, 26.21),
]


@pytest.mark.parametrize(("build", "size", "millions", "giga_macs"), PAPER)
def test_plain_forms_have_the_papers_figures(
    build: Callable[[], nn.Module], size: int, millions: float, giga_macs: float
) -> None:
    totals = planned(build, size).totals
    assert totals.params_after / 1e6 == pytest.approx(millions, rel=TABLES_WITHIN)
    assert totals.macs_after is not None
    assert totals.macs_after / 1e9 == pytest.approx(giga_macs, rel=TABLES_WITHIN)


@pytest.mark.parametrize(("build", "layers"), [(repvgg18, (4, 4, 4, 4)), (repvgg34, (6, 8, 12, 6))])
def test_resnets_of_two_blocks_for_one_follow_from_the_channels(
    build: Callable[[], nn.Module], layers: Sequence[int]
) -> None:
    assert planned(build, 224).totals.params_after == plain_parameters(layers, (64, 128, 256, 512), stem=7)


@pytest.mark.parametrize("depth", [26, 41, *(pytest.param(depth, marks=pytest.mark.slow) for depth in (50, 101, 133))])
def test_networks_of_figure_5_have_the_layers_of_rmnet(depth: int) -> None:
    layers = tuple(3 * blocks for blocks in stage_depths(depth))
    after = planned(lambda: repvgg_by_depth(depth), 32).totals.params_after
    assert after == plain_parameters(layers, (64, 128, 256, 512), classes=10)


@pytest.mark.parametrize(("stem", "kernel", "sums"), [("imagenet", 3, 9), ("cifar", 3, 10), ("resnet", 7, 9)])
def test_small_networks_convert_exactly(stem: str, kernel: int, sums: int) -> None:
    depths, widths = (1, 2, 2, 1), (8, 12, 16, 32)
    net = repvgg(depths, widths, groups=2, stem=stem, num_classes=10)  # type: ignore[arg-type]
    size = 16 if stem == "cifar" else 64
    expected = plain_parameters(depths, widths, 2, 10, kernel)
    assert_converts(net, expected, size=size, sums=sums)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: repvgg((1, 1, 1)), "repvgg: depths must be 4 positive block counts, got .1, 1, 1."),
        (lambda: repvgg((1, 1, 1, 1), (8, 8, 8)), "widths must be 4 multiples of groups 1, got .8, 8, 8."),
        (lambda: repvgg((1, 1, 1, 1), (8, 9, 8, 8), groups=4), "widths must be 4 multiples of groups 4"),
        (lambda: repvgg((1, 1, 1, 1), groups=0), "repvgg: groups must be positive, got 0"),
        (lambda: repvgg((1, 1, 1, 1), stem=UNKNOWN), "stem must be 'imagenet' or 'cifar' or 'resnet', got 'other'"),
        (lambda: repvgg_by_depth(27), "depth must be 3 . blocks . 2 .* got 27"),
    ],
)
def test_impossible_networks_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        build()
