"""What the networks of :mod:`rmfx.models` share: conv-BN pairs, the re-parametrisable stage, the classifier, checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from rmfx.errors import UnsupportedModelError

WIDTHS = (64, 128, 256, 512)  # of the four stages, from ResNet on; the "classic width setting" of the paper
Stem = Literal["imagenet", "cifar"]


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """A bias-free, size-keeping ("same"-padded) convolution and its batch norm."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """:func:`conv_bn` and a ReLU."""
    return conv_bn(in_channels, out_channels, kernel_size, stride, groups).append(nn.ReLU())


class RepStage(nn.Module):
    """One block of RepVGG (Ding et al. 2021, section 3; the paper's Figure 8b).

    Parallel 3x3 and 1x1 convs with BN, plus a BN of the input where shapes match, then ReLU. Maps
    ``[N, in_channels, H, W]`` to ``[N, out_channels, ceil(H / stride), ceil(W / stride)]``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.conv3 = conv_bn(in_channels, out_channels, 3, stride, groups)
        self.conv1 = conv_bn(in_channels, out_channels, 1, stride, groups)
        keeps_shape = stride == 1 and in_channels == out_channels
        self.identity = nn.BatchNorm2d(in_channels) if keeps_shape else None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(x) + self.conv1(x)
        if self.identity is not None:
            y = y + self.identity(x)
        return self.act(y)


class ConvNet(nn.Module):
    """Stem, stages, global average pool and one linear layer: ``[N, in_channels, H, W]`` to ``[N, num_classes]``.

    Args:
        stem: first layers.
        stages: blocks, or whole stages, in order.
        features: channels of what the last of them gives.
        num_classes: channels of the output.
    """

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], features: int, num_classes: int) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(features, num_classes)
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.stages(self.stem(x)))))


def resnet_stem(in_channels: int, stem: Stem, out_channels: int = WIDTHS[0]) -> nn.Sequential:
    """ResNet's first layers: 7x7 conv of stride 2 and max-pool for ImageNet, one 3x3 conv for CIFAR; BN and ReLU."""
    if stem == "imagenet":
        return conv_bn_relu(in_channels, out_channels, 7, 2).append(nn.MaxPool2d(3, 2, 1))
    return conv_bn_relu(in_channels, out_channels, 3)


def init_weights(model: nn.Module) -> None:
    """Draw the conv weights of ``model`` as ResNet and MobileNet do (He et al. 2015), in place.

    Normal, of variance ``2 / fan_out``, where ``fan_out`` counts the outputs that one input really reaches: those of
    its own group only. Biases are 0. Batch norms and linear layers keep PyTorch's initial values.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[:, 0].numel() // module.groups
            nn.init.normal_(module.weight, 0, (2 / fan_out) ** 0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def check_depths(network: str, depths: Sequence[int], stages: int = len(WIDTHS)) -> None:
    """Refuse numbers of blocks per stage that are not ``stages`` positive ones.

    Raises:
        UnsupportedModelError: names ``network``, what it needs and what it got.
    """
    if len(depths) != stages or min(depths) < 1:
        raise UnsupportedModelError(f"{network}: depths must be {stages} positive block counts, got {tuple(depths)}")


def check_choice(network: str, argument: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a ``value`` that is none of ``choices``.

    Raises:
        UnsupportedModelError: names ``network``, ``argument``, the choices and what it got.
    """
    if value not in choices:
        allowed = " or ".join(map(repr, choices))
        raise UnsupportedModelError(f"{network}: {argument} must be {allowed}, got {value!r}")


def check_stem(network: str, stem: str) -> None:
    """Refuse a ``stem`` that is neither ``"imagenet"`` nor ``"cifar"``.

    Raises:
        UnsupportedModelError: names ``network`` and what it got.
    """
    check_choice(network, "stem", stem, ("imagenet", "cifar"))


def check_positive(network: str, **numbers: float) -> None:
    """Refuse numbers that are not positive.

    Raises:
        UnsupportedModelError: names ``network``, the argument and what it got.

    >>> check_positive("vgg", num_classes=0)
    Traceback (most recent call last):
    rmfx.errors.UnsupportedModelError: vgg: num_classes must be positive, got 0
    """
    for argument, value in numbers.items():
        if value <= 0:
            raise UnsupportedModelError(f"{network}: {argument} must be positive, got {value}")


def scaled(channels: int, multiple: float, divisor: int = 8) -> int:
    """``channels * multiple``, rounded to a multiple of ``divisor`` and not down by more than a tenth (MobileNetV2).

    >>> scaled(32, 1.0), scaled(24, 0.5), scaled(16, 0.35)
    (32, 16, 8)
    """
    exact = channels * multiple
    rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * exact else rounded
