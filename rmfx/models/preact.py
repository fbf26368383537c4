"""Pre-activation ResNet (He et al. 2016b): batch norm and ReLU before each conv, nothing behind the sum.

The residual stream is signed: it is carried past the ReLUs of a branch by a PReLU of slope 1 in its channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rmfx.models.cifar_resnet import CIFAR_WIDTHS, blocks_per_stage
from rmfx.models.layers import (
    WIDTHS,
    ConvNet,
    Stem,
    check_depths,
    check_positive,
    check_stem,
    conv_bn_relu,
    resnet_stem,
)
from rmfx.models.resnet import EXPANSION


class PreactBlock(nn.Module):
    """BN, ReLU, then a branch added to the block's input: ``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``.

    Where the shape changes, the shortcut is a 1x1 conv of the activated input, and has no BN (the first block of
    He et al.'s section 3 and of their code). ``activate=False`` is for the first block of all, whose input the stem
    activates ("before splitting into two paths", their appendix).
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, bottleneck: bool, activate: bool = True
    ) -> None:
        super().__init__()
        self.preact = nn.Sequential(nn.BatchNorm2d(in_channels), nn.ReLU()) if activate else nn.Identity()
        if bottleneck:
            inner = out_channels // EXPANSION
            self.branch = nn.Sequential(
                *conv_bn_relu(in_channels, inner),
                *conv_bn_relu(inner, inner, 3, stride),
                nn.Conv2d(inner, out_channels, 1, bias=False),
            )
        else:
            self.branch = nn.Sequential(
                *conv_bn_relu(in_channels, out_channels, 3, stride),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            )
        keeps_shape = stride == 1 and in_channels == out_channels
        self.shortcut = None if keeps_shape else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.preact(x)
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return self.branch(y) + shortcut


class PreactResNet(ConvNet):
    """A pre-activation ResNet; build it with :func:`preact_resnet` or one of the named functions."""


def preact_blocks(
    depths: Sequence[int], widths: Sequence[int], *, bottleneck: bool, stem: Stem, num_classes: int, in_channels: int
) -> PreactResNet:
    """A pre-activation ResNet of ``depths`` blocks and ``widths`` channels per stage; a last BN and ReLU follow.

    Raises:
        UnsupportedModelError: for arguments of which no such network can be made.
    """
    check_depths("preact_resnet", depths, len(widths))
    check_stem("preact_resnet", stem)
    check_positive("preact_resnet", widths=min(widths), num_classes=num_classes, in_channels=in_channels)
    blocks: list[nn.Module] = []
    width = widths[0]
    for i, (stage_width, depth) in enumerate(zip(widths, depths, strict=True)):
        out = stage_width * (EXPANSION if bottleneck else 1)
        for j in range(depth):
            stride = 2 if i > 0 and j == 0 else 1
            blocks.append(PreactBlock(width, out, stride, bottleneck=bottleneck, activate=bool(blocks)))
            width = out
    last = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())
    return PreactResNet(resnet_stem(in_channels, stem, widths[0]), [*blocks, last], width, num_classes)


def preact_resnet(
    depth: int,
    num_classes: int = 10,
    *,
    bottleneck: bool = False,
    widths: Sequence[int] = CIFAR_WIDTHS,
    in_channels: int = 3,
) -> PreactResNet:
    """Build a pre-activation ResNet for CIFAR.

    Args:
        depth: layers, ``6n + 2``, or ``9n + 2`` where the blocks are bottlenecks.
        num_classes, in_channels: widths of the network's output and input.
        bottleneck: blocks of 1x1, 3x3 and 1x1 convs, instead of two 3x3.
        widths: of the three stages; inside of the blocks where they are bottlenecks.

    Raises:
        UnsupportedModelError: for arguments of which no such network can be made.

    >>> import torch
    >>> net = preact_resnet(11, bottleneck=True).eval()
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    n = blocks_per_stage("preact_resnet", depth, 9 if bottleneck else 6)
    depths = [n] * len(widths)
    return preact_blocks(
        depths, widths, bottleneck=bottleneck, stem="cifar", num_classes=num_classes, in_channels=in_channels
    )


def preact_resnet20(num_classes: int = 10, *, in_channels: int = 3) -> PreactResNet:
    """Pre-activation ResNet-20 for CIFAR: 0.27 M parameters."""
    return preact_resnet(20, num_classes, in_channels=in_channels)


def preact_resnet110(num_classes: int = 10, *, in_channels: int = 3) -> PreactResNet:
    """Pre-activation ResNet-110 for CIFAR: 1.7 M parameters."""
    return preact_resnet(110, num_classes, in_channels=in_channels)


def preact_resnet164(num_classes: int = 10, *, in_channels: int = 3) -> PreactResNet:
    """Pre-activation ResNet-164 for CIFAR, of bottlenecks: 1.7 M parameters."""
    return preact_resnet(164, num_classes, bottleneck=True, in_channels=in_channels)


def preact_resnet1001(num_classes: int = 10, *, in_channels: int = 3) -> PreactResNet:
    """Pre-activation ResNet-1001 for CIFAR, of bottlenecks: 10.3 M parameters."""
    return preact_resnet(1001, num_classes, bottleneck=True, in_channels=in_channels)


def preact_resnet18(num_classes: int = 1000, *, stem: Stem = "imagenet", in_channels: int = 3) -> PreactResNet:
    """Pre-activation ResNet-18: 11.7 M parameters."""
    return preact_blocks(
        (2, 2, 2, 2), WIDTHS, bottleneck=False, stem=stem, num_classes=num_classes, in_channels=in_channels
    )


def preact_resnet50(num_classes: int = 1000, *, stem: Stem = "imagenet", in_channels: int = 3) -> PreactResNet:
    """Pre-activation ResNet-50: 25.6 M parameters."""
    return preact_blocks(
        (3, 4, 6, 3), WIDTHS, bottleneck=True, stem=stem, num_classes=num_classes, in_channels=in_channels
    )
