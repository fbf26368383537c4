"""ResNet (He et al. 2016a), of which the paper's section 3.2 removes the residual connections.

ImageNet's ResNet-18 to 152 (with the stride on the 3x3 conv of a bottleneck, "v1.5", as torchvision and the paper's
4.11 G MACs of ResNet-50), and by ``stem="cifar"`` the paper's ResNet for 32x32 images, whose stem keeps the size.
The ResNets that He et al. trained on CIFAR-10 are in :mod:`rmfx.models.cifar_resnet`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rmfx.models.layers import (
    WIDTHS,
    ConvNet,
    Stem,
    check_depths,
    check_positive,
    check_stem,
    conv_bn,
    conv_bn_relu,
    resnet_stem,
)

EXPANSION = 4  # of a bottleneck: its output over its inner width


class ResidualBlock(nn.Module):
    """A branch added to a shortcut, then ReLU: ``[N, in_channels, H, W]`` to ``[N, out_channels, H', W']``.

    Args:
        branch, shortcut: both map the block's input to its output's shape.
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.branch(x) + self.shortcut(x))


class ResNet(ConvNet):
    """A residual network; build it with :func:`resnet` or one of the named functions."""


def basic_branch(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Two 3x3 convs with BN, a ReLU between them."""
    return nn.Sequential(*conv_bn_relu(in_channels, out_channels, 3, stride), *conv_bn(out_channels, out_channels, 3))


def bottleneck_branch(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """1x1, 3x3 with the stride, and 1x1 conv with BN, ReLUs between; ``out_channels / 4`` wide inside."""
    inner = out_channels // EXPANSION
    return nn.Sequential(
        *conv_bn_relu(in_channels, inner), *conv_bn_relu(inner, inner, 3, stride), *conv_bn(inner, out_channels)
    )


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The shortcut: the identity, or where the shape changes a 1x1 conv with BN."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return conv_bn(in_channels, out_channels, 1, stride)


def residual_blocks(
    depths: Sequence[int], widths: Sequence[int], bottleneck: bool, block: type[ResidualBlock]
) -> list[nn.Module]:
    """All blocks of a ResNet behind its stem of ``widths[0]`` channels; stages but the first begin with stride 2."""
    blocks: list[nn.Module] = []
    branch = bottleneck_branch if bottleneck else basic_branch
    width = widths[0]
    for i, (stage_width, depth) in enumerate(zip(widths, depths, strict=True)):
        out = stage_width * (EXPANSION if bottleneck else 1)
        for j in range(depth):
            stride = 2 if i > 0 and j == 0 else 1
            blocks.append(block(branch(width, out, stride), projection(width, out, stride)))
            width = out
    return blocks


def resnet(
    depths: Sequence[int],
    *,
    bottleneck: bool = False,
    widths: Sequence[int] = WIDTHS,
    stem: Stem = "imagenet",
    num_classes: int = 1000,
    in_channels: int = 3,
) -> ResNet:
    """Build a ResNet in training form.

    Args:
        depths: number of blocks in each of the four stages.
        bottleneck: blocks of 1x1, 3x3 and 1x1 convs, instead of two 3x3.
        widths: of the stages; inside of the blocks where they are bottlenecks.
        stem: ``"imagenet"``, a 7x7 conv and a max-pool of stride 2 each, or ``"cifar"``, a 3x3 conv of stride 1.
        num_classes, in_channels: widths of the network's output and input.

    Raises:
        UnsupportedModelError: for depths or widths of which no such network can be made.

    >>> import torch
    >>> net = resnet((1, 1, 1, 1), stem="cifar", num_classes=10).eval()
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    >>> net.stages[1].shortcut[0]
    Conv2d(64, 128, kernel_size=(1, 1), stride=(2, 2), bias=False)
    """
    check_resnet("resnet", depths, widths, stem, num_classes, in_channels)
    head = resnet_stem(in_channels, stem, widths[0])
    blocks = residual_blocks(depths, widths, bottleneck, ResidualBlock)
    return ResNet(head, blocks, widths[-1] * (EXPANSION if bottleneck else 1), num_classes)


def check_resnet(
    network: str, depths: Sequence[int], widths: Sequence[int], stem: str, num_classes: int, in_channels: int
) -> None:
    """Refuse arguments of which :func:`resnet` can make no network.

    Raises:
        UnsupportedModelError: names ``network``, the argument and what it got.
    """
    check_depths(network, depths, len(widths))
    check_stem(network, stem)
    check_positive(network, widths=min(widths), num_classes=num_classes, in_channels=in_channels)


def resnet18(num_classes: int = 1000, *, stem: Stem = "imagenet", in_channels: int = 3) -> ResNet:
    """ResNet-18: 11.7 M parameters, 1.82 G MACs at 224x224."""
    return resnet((2, 2, 2, 2), stem=stem, num_classes=num_classes, in_channels=in_channels)


def resnet34(num_classes: int = 1000, *, stem: Stem = "imagenet", in_channels: int = 3) -> ResNet:
    """ResNet-34: 21.8 M parameters, 3.67 G MACs at 224x224."""
    return resnet((3, 4, 6, 3), stem=stem, num_classes=num_classes, in_channels=in_channels)


def resnet34_cifar(num_classes: int = 10, *, in_channels: int = 3) -> ResNet:
    """ResNet-34 for 32x32 images, of the paper's Table 1: 21.3 M parameters, 1.16 G MACs."""
    return resnet34(num_classes, stem="cifar", in_channels=in_channels)


def resnet50(num_classes: int = 1000, *, stem: Stem = "imagenet", in_channels: int = 3) -> ResNet:
    """ResNet-50: 25.6 M parameters, 4.09 G MACs at 224x224."""
    return resnet((3, 4, 6, 3), bottleneck=True, stem=stem, num_classes=num_classes, in_channels=in_channels)


def resnet101(num_classes: int = 1000, *, stem: Stem = "imagenet", in_channels: int = 3) -> ResNet:
    """ResNet-101: 44.5 M parameters, 7.80 G MACs at 224x224."""
    return resnet((3, 4, 23, 3), bottleneck=True, stem=stem, num_classes=num_classes, in_channels=in_channels)


def resnet152(num_classes: int = 1000, *, stem: Stem = "imagenet", in_channels: int = 3) -> ResNet:
    """ResNet-152: 60.2 M parameters, 11.51 G MACs at 224x224."""
    return resnet((3, 8, 36, 3), bottleneck=True, stem=stem, num_classes=num_classes, in_channels=in_channels)
