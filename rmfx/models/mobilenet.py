"""MobileNetV1 (Howard et al. 2017) and MobileNetV2 (Sandler et al. 2018), for ImageNet and for 32x32 images.

The paper's section 3.3 converts a V2 to the shape of a V1: that V2 is in :mod:`rmfx.models.mobilenet_v1_shaped`.
Neither network has a dropout layer.
"""

from __future__ import annotations

from torch import Tensor, nn

from rmfx.models.layers import ConvNet, Stem, check_positive, check_stem, conv_bn, conv_bn_relu, scaled

# Width and stride of each depthwise-separable block of MobileNetV1, whose stem has V1_STEM channels.
V1_STEM = 32
V1_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
# Expansion, width, blocks and first stride of each stage of MobileNetV2 (its Table 2).
V2_STEM, V2_HEAD = 32, 1280
V2_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class MobileNetV1(ConvNet):
    """A chain of depthwise-separable convs, without residual connections; build it with :func:`mobilenet_v1`."""


class MobileNetV2(ConvNet):
    """A network of inverted residuals with linear bottlenecks; build it with :func:`mobilenet_v2`."""


class LinearBottleneck(nn.Module):
    """1x1 expand, 3x3 depthwise, 1x1 project without activation; added to the input where shapes match.

    Maps ``[N, in_channels, H, W]`` to ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``.

    Args:
        in_channels, out_channels: widths before and behind the block.
        expansion: inner width over ``in_channels``; 1 leaves out the expanding conv.
        stride: of the depthwise conv.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        expand = [*conv_bn(in_channels, inner), nn.ReLU6()] if expansion > 1 else []
        self.branch = nn.Sequential(
            *expand, *conv_bn(inner, inner, 3, stride, inner), nn.ReLU6(), *conv_bn(inner, out_channels)
        )
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.residual else self.branch(x)


def mobilenet_v1(
    num_classes: int = 1000, *, width_multiple: float = 1.0, stem: Stem = "imagenet", in_channels: int = 3
) -> MobileNetV1:
    """Build MobileNetV1: 4.23 M parameters, 0.57 G MACs at 224x224.

    Args:
        num_classes, in_channels: widths of the network's output and input.
        width_multiple: of all other widths; the publication's alpha.
        stem: ``"imagenet"``, a 3x3 conv of stride 2, or ``"cifar"``, of stride 1.

    Raises:
        UnsupportedModelError: for arguments of which no such network can be made.

    >>> import torch
    >>> mobilenet_v1(10, width_multiple=0.25, stem="cifar").eval()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    _check("mobilenet_v1", num_classes, width_multiple, stem, in_channels)
    width = scaled(V1_STEM, width_multiple)
    head = conv_bn_relu(in_channels, width, 3, 2 if stem == "imagenet" else 1)
    blocks: list[nn.Module] = []
    for channels, stride in V1_BLOCKS:
        out = scaled(channels, width_multiple)
        blocks.append(nn.Sequential(*conv_bn_relu(width, width, 3, stride, width), *conv_bn_relu(width, out)))
        width = out
    return MobileNetV1(head, blocks, width, num_classes)


def mobilenet_v2(
    num_classes: int = 1000, *, width_multiple: float = 1.0, stem: Stem = "imagenet", in_channels: int = 3
) -> MobileNetV2:
    """Build MobileNetV2: 3.50 M parameters, 0.30 G MACs at 224x224.

    Args:
        num_classes, in_channels: widths of the network's output and input.
        width_multiple: of all other widths, but of the last layer's only where it is above 1.
        stem: ``"imagenet"``, or ``"cifar"``, whose stem and second stage have stride 1.

    Raises:
        UnsupportedModelError: for arguments of which no such network can be made.

    >>> import torch
    >>> mobilenet_v2(10, width_multiple=0.25, stem="cifar").eval()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    _check("mobilenet_v2", num_classes, width_multiple, stem, in_channels)
    width = scaled(V2_STEM, width_multiple)
    head = nn.Sequential(*conv_bn(in_channels, width, 3, 2 if stem == "imagenet" else 1), nn.ReLU6())
    blocks: list[nn.Module] = []
    for i, (expansion, channels, depth, first_stride) in enumerate(V2_STAGES):
        out = scaled(channels, width_multiple)
        if i == 1 and stem == "cifar":
            first_stride = 1
        for j in range(depth):
            blocks.append(LinearBottleneck(width, out, expansion, first_stride if j == 0 else 1))
            width = out
    features = scaled(V2_HEAD, max(1.0, width_multiple))
    return MobileNetV2(head, [*blocks, *conv_bn(width, features), nn.ReLU6()], features, num_classes)


def _check(network: str, num_classes: int, width_multiple: float, stem: str, in_channels: int) -> None:
    check_stem(network, stem)
    check_positive(network, num_classes=num_classes, width_multiple=width_multiple, in_channels=in_channels)


def mobilenet_v1_cifar(num_classes: int = 10, *, in_channels: int = 3) -> MobileNetV1:
    """MobileNetV1 for 32x32 images, of the paper's Table 2: 3.22 M parameters, 46.4 M MACs."""
    return mobilenet_v1(num_classes, stem="cifar", in_channels=in_channels)


def mobilenet_v2_cifar(num_classes: int = 10, *, in_channels: int = 3) -> MobileNetV2:
    """MobileNetV2 for 32x32 images: 2.24 M parameters."""
    return mobilenet_v2(num_classes, stem="cifar", in_channels=in_channels)
