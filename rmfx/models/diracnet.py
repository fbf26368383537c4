"""DiracNet (Zagoruyko & Komodakis 2017, its second version): the residual connection is inside of the weight.

Each 3x3 conv has the weight ``a * delta + b * W / |W|``, with one ``a`` and one ``b`` per output channel, ``delta`` the
conv that copies its input, and ``|W|`` the norm of each output channel's filter; batch norm and ReLU follow. There is
no sum of feature maps: conversion computes the weights and folds the batch norms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rmfx.models.layers import WIDTHS, ConvNet, Stem, check_depths, check_positive, check_stem, resnet_stem


class DiracConv2d(nn.Module):
    """A bias-free 3x3 conv whose weight is Dirac-parametrised (the publication's section 3.1).

    Maps ``[N, in_channels, H, W]`` to ``[N, out_channels, H, W]``. Where it widens, ``delta`` copies the input to the
    first ``in_channels`` outputs. As published, ``a`` starts at 1 and ``b`` at 0.1.
    """

    delta: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.a = nn.Parameter(torch.ones(out_channels))
        self.b = nn.Parameter(torch.full((out_channels,), 0.1))
        self.register_buffer("delta", nn.init.dirac_(torch.empty_like(self.weight)), persistent=False)
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        normalised = F.normalize(self.weight.flatten(1)).view_as(self.weight)
        weight = self.a.view(-1, 1, 1, 1) * self.delta + self.b.view(-1, 1, 1, 1) * normalised
        return F.conv2d(x, weight, padding=1)


class DiracNet(ConvNet):
    """A chain of Dirac-parametrised convs; build it with :func:`diracnet` or one of the named functions."""


def diracnet(
    depths: Sequence[int],
    *,
    widths: Sequence[int] = WIDTHS,
    stem: Stem = "imagenet",
    num_classes: int = 1000,
    in_channels: int = 3,
) -> DiracNet:
    """Build a DiracNet: ResNet's stem, four groups of convs, and 2x2 max-pools between the groups.

    Args:
        depths: pairs of convs in each of the four groups.
        widths: channels of each.
        stem: ``"imagenet"``, a 7x7 conv and a max-pool of stride 2 each, or ``"cifar"``, a 3x3 conv of stride 1.
        num_classes, in_channels: widths of the network's output and input.

    Raises:
        UnsupportedModelError: for depths or widths of which no such network can be made.

    >>> import torch, rmfx
    >>> net = diracnet((1, 1, 1, 1), stem="cifar", num_classes=10).eval()
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    >>> rmfx.to_sequential(rmfx.convert(net), strict=True)[2]
    Conv2d(64, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """
    check_depths("diracnet", depths, len(widths))
    check_stem("diracnet", stem)
    check_positive("diracnet", widths=min(widths), num_classes=num_classes, in_channels=in_channels)
    layers: list[nn.Module] = []
    width = widths[0]
    for i, (out, depth) in enumerate(zip(widths, depths, strict=True)):
        if i > 0:
            layers.append(nn.MaxPool2d(2))
        for _ in range(2 * depth):
            layers.append(nn.Sequential(DiracConv2d(width, out), nn.BatchNorm2d(out), nn.ReLU()))
            width = out
    return DiracNet(resnet_stem(in_channels, stem, widths[0]), layers, width, num_classes)


def diracnet18(num_classes: int = 1000, *, stem: Stem = "imagenet", in_channels: int = 3) -> DiracNet:
    """DiracNet-18: 11.5 M parameters converted."""
    return diracnet((2, 2, 2, 2), stem=stem, num_classes=num_classes, in_channels=in_channels)


def diracnet34(num_classes: int = 1000, *, stem: Stem = "imagenet", in_channels: int = 3) -> DiracNet:
    """DiracNet-34: 21.6 M parameters converted."""
    return diracnet((3, 4, 6, 3), stem=stem, num_classes=num_classes, in_channels=in_channels)


def diracnet34_cifar(num_classes: int = 10, *, in_channels: int = 3) -> DiracNet:
    """DiracNet-34 for 32x32 images, of the paper's Table 1: 21.1 M parameters and 1.15 G MACs converted."""
    return diracnet34(num_classes, stem="cifar", in_channels=in_channels)
