"""The MobileNetV2 that becomes MobileNetV1 (the paper's sections 3.3 and 4.3, Table 2).

The paper does not print its network; this one follows from what the conversion does. Let MobileNetV1's depthwise
convs have ``w[j]`` channels and its pointwise convs ``w[j + 1]``. Block ``j`` of the V2 expands to ``t[j]`` channels
(1x1), convolves them depthwise (3x3) and projects them (1x1, linear) to ``p[j]``::

    p[j] = w[j + 1]     the projection has the width of V1's pointwise conv
    k[j] = w[j] / 4     channels are residual, in blocks of stride 1 (but the first, which has no expanding conv)
    t[j] = w[j] - k[j]  channels are left for the branch

Conversion carries the ``k[j]`` channels beside the ``t[j]`` through the depthwise conv, which then has ``w[j]``;
no activation stands between a projection and the next block's expansion, which fuse to one 1x1 conv of ``w[j]`` to
``w[j + 1]`` channels. ``rmfx.convert(net, x, fuse="always")`` thus has the layers of V1, with 46.4 M MACs of 83.9 M
(Table 2: 47.1 of 83.4). The ReLUs of the carried channels are PReLUs of slope 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rmfx.models.layers import ConvNet, check_positive, conv_bn, conv_bn_relu, scaled
from rmfx.models.mobilenet import V1_BLOCKS, V1_STEM

CARRIED = 4  # one of so many channels of a depthwise conv of stride 1 is residual


class PartialResidual(nn.Module):
    """1x1 expand, 3x3 depthwise, 1x1 project without activation; the first ``carried`` channels are residual.

    Maps ``[N, in_channels, H, W]`` to ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``. Stride 1 only where
    ``carried`` is not 0.
    """

    def __init__(self, in_channels: int, inner: int, out_channels: int, stride: int, carried: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *conv_bn_relu(in_channels, inner),
            *conv_bn_relu(inner, inner, 3, stride, inner),
            *conv_bn(inner, out_channels),
        )
        self.carried = carried

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if not self.carried:
            return y
        return torch.cat((y[:, : self.carried] + x[:, : self.carried], y[:, self.carried :]), 1)


class V1ShapedMobileNetV2(ConvNet):
    """A MobileNetV2 whose plain form is a MobileNetV1; build it with :func:`mobilenet_v1_shaped`."""


def mobilenet_v1_shaped(
    num_classes: int = 10, *, width_multiple: float = 1.0, in_channels: int = 3
) -> V1ShapedMobileNetV2:
    """Build the paper's MobileNetV2 for 32x32 images that converts to MobileNetV1.

    Args:
        num_classes, in_channels: widths of the network's output and input.
        width_multiple: of all other widths, as in :func:`rmfx.models.mobilenet_v1`.

    Raises:
        UnsupportedModelError: for arguments of which no such network can be made.

    >>> import torch, rmfx
    >>> net = mobilenet_v1_shaped(width_multiple=0.25).eval()
    >>> plain = rmfx.convert(net, torch.randn(1, 3, 32, 32), fuse="always")
    >>> [m.out_channels for m in plain.modules() if isinstance(m, nn.Conv2d)][:6]
    [8, 8, 16, 16, 32, 32]
    """
    check_positive(
        "mobilenet_v1_shaped", num_classes=num_classes, width_multiple=width_multiple, in_channels=in_channels
    )
    stem = scaled(V1_STEM, width_multiple)
    width = scaled(V1_BLOCKS[0][0], width_multiple)
    first = nn.Sequential(*conv_bn_relu(stem, stem, 3, 1, stem), *conv_bn(stem, width))
    blocks: list[nn.Module] = [first]
    for channels, stride in V1_BLOCKS[1:]:
        out = scaled(channels, width_multiple)
        carried = width // CARRIED if stride == 1 else 0
        blocks.append(PartialResidual(width, width - carried, out, stride, carried))
        width = out
    head = conv_bn_relu(width, width)
    return V1ShapedMobileNetV2(conv_bn_relu(in_channels, stem, 3), [*blocks, head], width, num_classes)
