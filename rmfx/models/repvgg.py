"""RepVGG (Ding et al. 2021), in training form: each layer a 3x3 conv, a 1x1 conv and the identity, with BN, summed.

``repvgg_a0`` to ``repvgg_b3g4`` are those published (their Table 2: depths, widths, and the groups of every second
layer). ``repvgg18`` and ``repvgg34`` are of the paper's Table 3: ResNet-18 and 34 with two RepVGG blocks for each
basic block, behind ResNet's stem. :func:`repvgg_by_depth` is for its Figure 5.

For 32x32 images (``stem="cifar"``) the stem and the first stage have stride 1, the other three 2: the placement by
which RepVGG-A2 has the 1.67 G MACs of the paper's Table 1 (and the 24.1 M parameters, converted).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from rmfx.errors import UnsupportedModelError
from rmfx.models.depths import stage_depths
from rmfx.models.layers import (
    WIDTHS,
    ConvNet,
    RepStage,
    Stem,
    check_choice,
    check_depths,
    check_positive,
    resnet_stem,
)

RepStem = Literal["imagenet", "cifar", "resnet"]


class RepVGG(ConvNet):
    """A chain of RepVGG blocks; build it with :func:`repvgg` or one of the named functions."""


def repvgg(
    depths: Sequence[int],
    widths: Sequence[int] = WIDTHS,
    *,
    groups: int = 1,
    stem: RepStem = "imagenet",
    num_classes: int = 1000,
    in_channels: int = 3,
) -> RepVGG:
    """Build a RepVGG in training form.

    Args:
        depths: number of layers in each of the four stages.
        widths: channels of each; the stem has those of the first, but no more than 64.
        groups: of every second layer behind the stem.
        stem: ``"imagenet"``, a RepVGG block of stride 2, and first stage of stride 2; ``"cifar"``, both of stride 1;
            ``"resnet"``, ResNet's 7x7 conv and max-pool, and first stage of stride 1.
        num_classes, in_channels: widths of the network's output and input.

    Raises:
        UnsupportedModelError: for depths, widths or groups of which no such network can be made.

    >>> import torch
    >>> net = repvgg((1, 2, 1, 1), (16, 32, 32, 64), groups=2, stem="cifar", num_classes=10).eval()
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    >>> net.stages[1].conv3[0]
    Conv2d(16, 32, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=2, bias=False)
    """
    check_depths("repvgg", depths, len(WIDTHS))
    check_choice("repvgg", "stem", stem, ("imagenet", "cifar", "resnet"))
    check_positive("repvgg", widths=min(widths), groups=groups, num_classes=num_classes, in_channels=in_channels)
    if len(widths) != len(depths) or any(width % groups for width in widths):
        raise UnsupportedModelError(f"repvgg: widths must be 4 multiples of groups {groups}, got {tuple(widths)}")
    width = min(64, widths[0])
    if stem == "resnet":
        head: nn.Module = resnet_stem(in_channels, "imagenet", width)
    else:
        head = RepStage(in_channels, width, 2 if stem == "imagenet" else 1)
    blocks: list[nn.Module] = []
    for i, (out, depth) in enumerate(zip(widths, depths, strict=True)):
        for j in range(depth):
            stride = 2 if j == 0 and (i > 0 or stem == "imagenet") else 1
            blocks.append(RepStage(width, out, stride, groups if len(blocks) % 2 else 1))
            width = out
    return RepVGG(head, blocks, width, num_classes)


def repvgg_by_depth(
    depth: int,
    *,
    widths: Sequence[int] = WIDTHS,
    stem: RepStem = "cifar",
    num_classes: int = 10,
    in_channels: int = 3,
) -> RepVGG:
    """A RepVGG with as many layers in each stage as the RMNet of ``depth`` (the paper's Figure 5).

    That is three for each block of :func:`rmfx.models.rmnet_by_depth`. Other arguments and errors are those of
    :func:`repvgg`.

    >>> len(repvgg_by_depth(26).stages)
    24
    """
    depths = stage_depths(depth, layers_per_block=1)
    return repvgg(depths, widths, stem=stem, num_classes=num_classes, in_channels=in_channels)


def _a(multiple: float, last: float, num_classes: int, stem: Stem, in_channels: int = 3) -> RepVGG:
    widths = _widths(multiple, last)
    return repvgg((2, 4, 14, 1), widths, stem=stem, num_classes=num_classes, in_channels=in_channels)


def _b(multiple: float, last: float, num_classes: int, stem: Stem, groups: int = 1) -> RepVGG:
    return repvgg((4, 6, 16, 1), _widths(multiple, last), groups=groups, stem=stem, num_classes=num_classes)


def _widths(multiple: float, last: float) -> list[int]:
    """The publication's ``a`` and ``b``: multiples of the first three widths, and of the last."""
    return [int(width * times) for width, times in zip(WIDTHS, (multiple, multiple, multiple, last), strict=True)]


def repvgg_a0(num_classes: int = 1000, *, stem: Stem = "imagenet") -> RepVGG:
    """RepVGG-A0: 8.30 M parameters converted."""
    return _a(0.75, 2.5, num_classes, stem)


def repvgg_a1(num_classes: int = 1000, *, stem: Stem = "imagenet") -> RepVGG:
    """RepVGG-A1: 12.78 M parameters converted."""
    return _a(1, 2.5, num_classes, stem)


def repvgg_a2(num_classes: int = 1000, *, stem: Stem = "imagenet") -> RepVGG:
    """RepVGG-A2: 25.49 M parameters converted."""
    return _a(1.5, 2.75, num_classes, stem)


def repvgg_a2_cifar(num_classes: int = 10, *, in_channels: int = 3) -> RepVGG:
    """RepVGG-A2 for 32x32 images, of the paper's Table 1: 24.1 M parameters and 1.67 G MACs converted."""
    return _a(1.5, 2.75, num_classes, "cifar", in_channels)


def repvgg_b0(num_classes: int = 1000, *, stem: Stem = "imagenet") -> RepVGG:
    """RepVGG-B0: 14.33 M parameters converted."""
    return _b(1, 2.5, num_classes, stem)


def repvgg_b1(num_classes: int = 1000, *, stem: Stem = "imagenet") -> RepVGG:
    """RepVGG-B1: 51.82 M parameters converted."""
    return _b(2, 4, num_classes, stem)


def repvgg_b1g2(num_classes: int = 1000, *, stem: Stem = "imagenet") -> RepVGG:
    """RepVGG-B1g2: 41.36 M parameters converted."""
    return _b(2, 4, num_classes, stem, 2)


def repvgg_b1g4(num_classes: int = 1000, *, stem: Stem = "imagenet") -> RepVGG:
    """RepVGG-B1g4: 36.12 M parameters converted."""
    return _b(2, 4, num_classes, stem, 4)


def repvgg_b2(num_classes: int = 1000, *, stem: Stem = "imagenet") -> RepVGG:
    """RepVGG-B2: 80.31 M parameters converted."""
    return _b(2.5, 5, num_classes, stem)


def repvgg_b2g2(num_classes: int = 1000, *, stem: Stem = "imagenet") -> RepVGG:
    """RepVGG-B2g2: 63.95 M parameters converted."""
    return _b(2.5, 5, num_classes, stem, 2)


def repvgg_b2g4(num_classes: int = 1000, *, stem: Stem = "imagenet") -> RepVGG:
    """RepVGG-B2g4: 55.77 M parameters converted."""
    return _b(2.5, 5, num_classes, stem, 4)


def repvgg_b3(num_classes: int = 1000, *, stem: Stem = "imagenet") -> RepVGG:
    """RepVGG-B3: 110.96 M parameters converted."""
    return _b(3, 5, num_classes, stem)


def repvgg_b3g2(num_classes: int = 1000, *, stem: Stem = "imagenet") -> RepVGG:
    """RepVGG-B3g2: 87.40 M parameters converted."""
    return _b(3, 5, num_classes, stem, 2)


def repvgg_b3g4(num_classes: int = 1000, *, stem: Stem = "imagenet") -> RepVGG:
    """RepVGG-B3g4: 75.62 M parameters converted."""
    return _b(3, 5, num_classes, stem, 4)


def repvgg18(num_classes: int = 1000) -> RepVGG:
    """RepVGG-18 of the paper's Table 3: 11.5 M parameters and 1.80 G MACs converted."""
    return repvgg((4, 4, 4, 4), stem="resnet", num_classes=num_classes)


def repvgg34(num_classes: int = 1000) -> RepVGG:
    """RepVGG-34 of the paper's Table 3: 21.6 M parameters and 3.65 G MACs converted."""
    return repvgg((6, 8, 12, 6), stem="resnet", num_classes=num_classes)
