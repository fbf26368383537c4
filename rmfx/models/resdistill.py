"""The student network of ResDistill (Li et al. 2020): a ResNet whose shortcuts fade out while it is trained.

While it learns from a teacher that keeps its shortcuts, the student's are scaled by a strength that goes from 1 to 0.
Then they are not computed any more, projections included: the student is a plain network, and conversion has only
batch norms to fold and projections to leave out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rmfx.errors import UnsupportedModelError
from rmfx.models.layers import WIDTHS, Stem, resnet_stem
from rmfx.models.resnet import EXPANSION, ResidualBlock, ResNet, check_resnet, residual_blocks


class FadingBlock(ResidualBlock):
    """A residual block whose shortcut is multiplied by ``strength``, and not computed where that is 0."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__(branch, shortcut)
        self.strength = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.strength > 0:
            y = y + self.shortcut(x) * self.strength
        return self.act(y)


class FadingResNet(ResNet):
    """A ResNet whose shortcuts can be faded; build it with :func:`fading_resnet` or one of the named functions.

    The strength is part of its state dict, as a tensor of one number: a checkpoint restores it.
    """

    @property
    def strength(self) -> float:
        """The factor of all shortcuts: 1 at first."""
        return next(block.strength for block in self.modules() if isinstance(block, FadingBlock))

    def fade(self, strength: float) -> None:
        """Multiply all shortcuts by ``strength``, from 1 (a ResNet) to 0 (a plain network), from now on.

        Raises:
            UnsupportedModelError: when ``strength`` is outside of [0, 1].
        """
        if not 0 <= strength <= 1:
            raise UnsupportedModelError(f"fade: strength must be from 0 to 1, got {strength}")
        for block in self.modules():
            if isinstance(block, FadingBlock):
                block.strength = float(strength)

    def get_extra_state(self) -> Tensor:
        """The strength, as a tensor, which every file format of state dicts can hold."""
        return torch.tensor(self.strength, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Fade to the strength of a state dict."""
        self.fade(float(state))


def fading_resnet(
    depths: Sequence[int],
    *,
    bottleneck: bool = False,
    widths: Sequence[int] = WIDTHS,
    stem: Stem = "imagenet",
    num_classes: int = 1000,
    in_channels: int = 3,
) -> FadingResNet:
    """Build a ResNet whose shortcuts can be faded; arguments and errors are those of :func:`rmfx.models.resnet`.

    >>> import torch, rmfx
    >>> net = fading_resnet((1, 1, 1, 1), stem="cifar", num_classes=10).eval()
    >>> net.fade(0.0)
    >>> len(rmfx.to_sequential(rmfx.convert(net), strict=True))  # 9 convs and ReLUs, pool, flatten, linear
    21
    """
    check_resnet("fading_resnet", depths, widths, stem, num_classes, in_channels)
    head = resnet_stem(in_channels, stem, widths[0])
    blocks = residual_blocks(depths, widths, bottleneck, FadingBlock)
    return FadingResNet(head, blocks, widths[-1] * (EXPANSION if bottleneck else 1), num_classes)


def resdistill34(num_classes: int = 1000, *, stem: Stem = "imagenet", in_channels: int = 3) -> FadingResNet:
    """The student of ResDistill 34: a ResNet-34 whose shortcuts can be faded."""
    return fading_resnet((3, 4, 6, 3), stem=stem, num_classes=num_classes, in_channels=in_channels)


def resdistill34_cifar(num_classes: int = 10, *, in_channels: int = 3) -> FadingResNet:
    """The student of ResDistill 34 for 32x32 images, of the paper's Table 1: 21.1 M parameters when faded out."""
    return resdistill34(num_classes, stem="cifar", in_channels=in_channels)


def resdistill50(num_classes: int = 1000, *, stem: Stem = "imagenet", in_channels: int = 3) -> FadingResNet:
    """The student of ResDistill 50: a ResNet-50 whose shortcuts can be faded."""
    return fading_resnet((3, 4, 6, 3), bottleneck=True, stem=stem, num_classes=num_classes, in_channels=in_channels)
