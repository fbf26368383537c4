"""RMNet, the paper's networks (section 4.2, Table 1, appendix A.4), in their *training* form.

The training form has residual connections; the plain form of the paper's Table 4 is what
:func:`rmfx.convert` makes of it, and nothing here builds it by hand.

The rule behind "RMNet ``L x T_G``", found from Table 4 and checked against Table 1 (parameters within
0.4 %, MACs within 0.4 %). Stage ``i = 0..3`` has width ``C = 64 * 2**i`` and ``G * 2**i`` channels per group::

    branch    1x1 C_in -> (T-1)*C, 3x3 in groups of G*2**i, 1x1 (T-1)*C -> C      a BN behind each conv
    shortcut  identity; where the shape changes: 1x1 conv with the stride, and BN
    converted C_in carried channels join the (T-1)*C: the inner width is T*C where C_in = C, as the paper's "T" says,
              and (T-1)*C + C/2 in a block that doubles the width and carries its input (the paper's Figure 2b)

For 26x3_32: 128 + 64 = 192 channels in 6 groups, and 256 + 64 = 320 in 5 groups where 64 becomes 128.
The stem and its stages are those of RepVGG: 3x3 conv-BN + 1x1 conv-BN (+ BN where the shape allows), then ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rmfx.errors import UnsupportedModelError
from rmfx.models.depths import stage_depths
from rmfx.models.layers import WIDTHS, ConvNet, RepStage, Stem, check_depths, check_positive, check_stem, conv_bn


class InvertedResidual(nn.Module):
    """1x1 expand, grouped 3x3, 1x1 project; added to the shortcut, then ReLU.

    Maps ``[N, in_channels, H, W]`` to ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``.

    Args:
        in_channels, out_channels: widths of the residual stream before and behind the block.
        inner: width of the grouped 3x3 conv, a multiple of ``channels_per_group``.
        channels_per_group: of the 3x3 conv.
        stride: of the 3x3 conv and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, inner: int, channels_per_group: int, stride: int) -> None:
        super().__init__()
        self.expand = conv_bn(in_channels, inner)
        self.act1 = nn.ReLU()
        self.grouped = conv_bn(inner, inner, 3, stride, groups=inner // channels_per_group)
        self.act2 = nn.ReLU()
        self.project = conv_bn(inner, out_channels)
        keeps_shape = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if keeps_shape else conv_bn(in_channels, out_channels, 1, stride)
        self.act3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act2(self.grouped(self.act1(self.expand(x))))
        return self.act3(self.project(y) + self.shortcut(x))


class RMNet(ConvNet):
    """The paper's network before conversion; build it with :func:`rmnet` or one of the named functions."""


def _check(depths: Sequence[int], widths: Sequence[int], multiple: int, channels_per_group: int, stem: str) -> None:
    check_depths("rmnet", depths)
    if len(widths) != len(depths) or min(widths) < 1:
        raise UnsupportedModelError(f"rmnet: widths must be {len(depths)} positive numbers, got {tuple(widths)}")
    check_stem("rmnet", stem)
    if multiple < 2:
        raise UnsupportedModelError(f"rmnet: multiple must be at least 2 (one of them is carried), got {multiple}")
    for stage, ordinal in enumerate(("first", "second", "third", "last")):
        inner, per_group = widths[stage] * (multiple - 1), channels_per_group * 2**stage
        if per_group < 1 or inner % per_group:
            raise UnsupportedModelError(
                f"rmnet: channels_per_group must divide the {ordinal} stage's inner width {inner}, got {per_group}"
            )


def rmnet(
    depths: Sequence[int],
    multiple: int,
    channels_per_group: int,
    *,
    widths: Sequence[int] = WIDTHS,
    stem: Stem = "imagenet",
    num_classes: int = 1000,
    in_channels: int = 3,
) -> RMNet:
    """Build an RMNet in training form.

    Args:
        depths: number of blocks in each of the four stages.
        multiple: the paper's ``T``: inner width over outer width, after conversion.
        channels_per_group: of the first stage's grouped convs; doubles with each stage.
        widths: of the residual stream in each stage.
        stem: ``"imagenet"``, two stages of stride 2, or ``"cifar"``, one of stride 1.
        num_classes, in_channels: widths of the network's output and input.

    Raises:
        UnsupportedModelError: for depths or widths of which no such network can be made.

    >>> import torch
    >>> net = rmnet((1, 1, 1, 1), 3, 32, stem="cifar", num_classes=10).eval()
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    >>> net.stages[1].grouped[0]
    Conv2d(256, 256, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), groups=4, bias=False)
    """
    _check(depths, widths, multiple, channels_per_group, stem)
    check_positive("rmnet", num_classes=num_classes, in_channels=in_channels)
    first = widths[0]
    if stem == "imagenet":
        head: nn.Module = nn.Sequential(RepStage(in_channels, first, 2), RepStage(first, first, 2))
    else:
        head = RepStage(in_channels, first, 1)
    blocks: list[nn.Module] = []
    width = first
    for i, (out, depth) in enumerate(zip(widths, depths, strict=True)):
        for j in range(depth):
            stride = 2 if i > 0 and j == 0 else 1
            blocks.append(InvertedResidual(width, out, (multiple - 1) * out, channels_per_group * 2**i, stride))
            width = out
    return RMNet(head, blocks, width, num_classes)


def rmnet_by_depth(
    depth: int,
    multiple: int = 3,
    channels_per_group: int = 32,
    *,
    widths: Sequence[int] = WIDTHS,
    stem: Stem = "cifar",
    num_classes: int = 10,
    in_channels: int = 3,
) -> RMNet:
    """An RMNet of ``depth`` layers (:func:`rmfx.models.depths.stage_depths`), as in the paper's Figure 5.

    Other arguments and errors are those of :func:`rmnet`.

    >>> len(rmnet_by_depth(41).stages)
    13
    """
    options = {"num_classes": num_classes, "in_channels": in_channels}
    return rmnet(stage_depths(depth), multiple, channels_per_group, widths=widths, stem=stem, **options)


def rmnet26x3_32(num_classes: int = 10, *, in_channels: int = 3) -> RMNet:
    """RMNet 26x3_32 for 32x32 images, the network of the paper's Table 4.

    >>> round(sum(p.numel() for p in rmnet26x3_32().parameters()) / 1e6, 2)
    8.91
    """
    return rmnet((2, 2, 2, 2), 3, 32, stem="cifar", num_classes=num_classes, in_channels=in_channels)


def rmnet41x4_8(num_classes: int = 1000) -> RMNet:
    """RMNet 41x4_8 for ImageNet (11.2 M parameters in this form)."""
    return rmnet((2, 3, 5, 3), 4, 8, num_classes=num_classes)


def rmnet41x5_16(num_classes: int = 1000) -> RMNet:
    """RMNet 41x5_16 for ImageNet (23.9 M parameters converted)."""
    return rmnet((2, 3, 5, 3), 5, 16, num_classes=num_classes)


def rmnet50x5_32(num_classes: int = 1000) -> RMNet:
    """RMNet 50x5_32 for ImageNet (39.6 M parameters converted)."""
    return rmnet((3, 4, 6, 3), 5, 32, num_classes=num_classes)


def rmnet50x6_32(num_classes: int = 1000) -> RMNet:
    """RMNet 50x6_32 for ImageNet (47.6 M parameters converted)."""
    return rmnet((3, 4, 6, 3), 6, 32, num_classes=num_classes)


def rmnet101x6_16(num_classes: int = 1000) -> RMNet:
    """RMNet 101x6_16 for ImageNet (59.45 M parameters converted)."""
    return rmnet((3, 4, 23, 3), 6, 16, num_classes=num_classes)


def rmnet152x6_32(num_classes: int = 1000) -> RMNet:
    """RMNet 152x6_32 for ImageNet (126.92 M parameters converted)."""
    return rmnet((3, 8, 36, 3), 6, 32, num_classes=num_classes)
