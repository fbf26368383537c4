"""The ResNets of He et al. 2016a for CIFAR-10 (section 4.2): 6n+2 layers in three stages of 16, 32 and 64 channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from rmfx.errors import UnsupportedModelError
from rmfx.models.layers import check_choice, check_positive, resnet_stem
from rmfx.models.resnet import ResidualBlock, ResNet, basic_branch, projection

CIFAR_WIDTHS = (16, 32, 64)
Shortcut = Literal["pad", "conv"]


class PadShortcut(nn.Module):
    """He et al.'s option A: every ``stride``-th pixel, and zeros for the channels that are new; no parameters.

    Maps ``[N, in_channels, H, W]`` to ``[N, in_channels + more, ceil(H / stride), ceil(W / stride)]``.
    """

    def __init__(self, more: int, stride: int) -> None:
        super().__init__()
        self.more = more
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))


def pad_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The identity, or :class:`PadShortcut` where the shape changes."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return PadShortcut(out_channels - in_channels, stride)


def blocks_per_stage(network: str, depth: int, layers: int) -> int:
    """The ``n`` of a network of ``depth = layers * n + 2`` layers.

    Raises:
        UnsupportedModelError: when there is no such ``n``; names ``network``.
    """
    n, rest = divmod(depth - 2, layers)
    if rest or n < 1:
        raise UnsupportedModelError(f"{network}: depth must be {layers}n + 2 with n at least 1, got {depth}")
    return n


def cifar_resnet(
    depth: int,
    num_classes: int = 10,
    *,
    shortcut: Shortcut = "pad",
    widths: Sequence[int] = CIFAR_WIDTHS,
    in_channels: int = 3,
) -> ResNet:
    """Build a ResNet of He et al.'s CIFAR form.

    Args:
        depth: layers, ``6n + 2``.
        num_classes, in_channels: widths of the network's output and input.
        shortcut: where the shape changes: ``"pad"`` (option A: subsampled, and zeros) or ``"conv"`` (1x1 conv, BN).
        widths: of the three stages.

    Raises:
        UnsupportedModelError: for arguments of which no such network can be made.

    >>> import torch
    >>> net = cifar_resnet(8).eval()
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    n = blocks_per_stage("cifar_resnet", depth, 6)
    check_choice("cifar_resnet", "shortcut", shortcut, ("pad", "conv"))
    check_positive("cifar_resnet", widths=min(widths), num_classes=num_classes, in_channels=in_channels)
    make_shortcut = pad_shortcut if shortcut == "pad" else projection
    blocks: list[nn.Module] = []
    width = widths[0]
    for i, out in enumerate(widths):
        for j in range(n):
            stride = 2 if i > 0 and j == 0 else 1
            blocks.append(ResidualBlock(basic_branch(width, out, stride), make_shortcut(width, out, stride)))
            width = out
    return ResNet(resnet_stem(in_channels, "cifar", widths[0]), blocks, width, num_classes)


def resnet20(num_classes: int = 10, *, in_channels: int = 3) -> ResNet:
    """ResNet-20 for CIFAR: 0.27 M parameters."""
    return cifar_resnet(20, num_classes, in_channels=in_channels)


def resnet32(num_classes: int = 10, *, in_channels: int = 3) -> ResNet:
    """ResNet-32 for CIFAR: 0.46 M parameters."""
    return cifar_resnet(32, num_classes, in_channels=in_channels)


def resnet44(num_classes: int = 10, *, in_channels: int = 3) -> ResNet:
    """ResNet-44 for CIFAR: 0.66 M parameters."""
    return cifar_resnet(44, num_classes, in_channels=in_channels)


def resnet56(num_classes: int = 10, *, in_channels: int = 3) -> ResNet:
    """ResNet-56 for CIFAR: 0.85 M parameters."""
    return cifar_resnet(56, num_classes, in_channels=in_channels)


def resnet110(num_classes: int = 10, *, in_channels: int = 3) -> ResNet:
    """ResNet-110 for CIFAR: 1.7 M parameters."""
    return cifar_resnet(110, num_classes, in_channels=in_channels)


def resnet1202(num_classes: int = 10, *, in_channels: int = 3) -> ResNet:
    """ResNet-1202 for CIFAR: 19.4 M parameters."""
    return cifar_resnet(1202, num_classes, in_channels=in_channels)
