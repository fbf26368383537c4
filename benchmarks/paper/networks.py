"""The networks that are trained here, in their forms for small images, by name and at any width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from rmfx import models

FULL_WIDTH = 64  # of the first stage, in the paper
FIGURE5_DEPTHS = (26, 50, 98, 133)  # 3 * blocks + 2, and the paper's 133, 3 * blocks + 1
_FIGURE5_PART, _FIGURE5_LEAST = 4, 8  # Figure 5's networks are a quarter as wide, so that the deepest can be trained
_A2 = (1.5, 1.5, 1.5, 2.75)


@dataclass(frozen=True)
class Network:
    """One network.

    Attributes:
        build: from input channels, classes, and the width of the first stage, 64 in the paper; MobileNets have one.
        teacher: the name of the network that teaches it, if any.
        finetuned: whether the paper's Figure 9 trains it on after conversion.
    """

    build: Callable[[int, int, int], nn.Module]
    teacher: str | None = None
    finetuned: bool = False


def _resnet(depths: tuple[int, ...], builder: Callable[..., nn.Module] = models.resnet) -> Callable[..., nn.Module]:
    return lambda channels, classes, width: builder(
        depths, widths=_widths(width), stem="cifar", num_classes=classes, in_channels=channels
    )


def _repvgg(depths: tuple[int, ...], multiples: tuple[float, ...] = (1, 1, 1, 1)) -> Callable[..., nn.Module]:
    return lambda channels, classes, width: models.repvgg(
        depths, _widths(width, multiples), stem="cifar", num_classes=classes, in_channels=channels
    )


def _rmnet_by_depth(depth: int, part: int = 1) -> Callable[..., nn.Module]:
    return lambda channels, classes, width: models.rmnet_by_depth(
        depth, 3, _part(width, part) // 2, widths=_widths(_part(width, part)), num_classes=classes, in_channels=channels
    )


def _repvgg_by_depth(depth: int) -> Callable[..., nn.Module]:
    return lambda channels, classes, width: models.repvgg_by_depth(
        depth, widths=_widths(_part(width, _FIGURE5_PART)), num_classes=classes, in_channels=channels
    )


def _mobilenet(builder: Callable[..., nn.Module], **options: str) -> Callable[..., nn.Module]:
    return lambda channels, classes, width: builder(num_classes=classes, in_channels=channels, **options)


def _widths(first: int, multiples: tuple[float, ...] = (1, 1, 1, 1)) -> tuple[int, ...]:
    return tuple(int(first * 2**stage * multiple) for stage, multiple in enumerate(multiples))


def _part(width: int, part: int) -> int:
    return width if part == 1 else max(_FIGURE5_LEAST, width // part)


NETWORKS = {
    "ResNet 18": Network(_resnet((2, 2, 2, 2)), finetuned=True),
    "ResNet 34": Network(_resnet((3, 4, 6, 3)), finetuned=True),
    "DiracNet 34": Network(_resnet((3, 4, 6, 3), models.diracnet)),
    "ResDistill 34": Network(_resnet((3, 4, 6, 3), models.fading_resnet), teacher="ResNet 34"),
    "RepVGG A2": Network(_repvgg((2, 4, 14, 1), _A2)),
    "RepVGG 18": Network(_repvgg((4, 4, 4, 4))),
    "RepVGG 34": Network(_repvgg((6, 8, 12, 6))),
    "RMNet 26x3_32": Network(_rmnet_by_depth(26)),
    "MobileNetV1": Network(_mobilenet(models.mobilenet_v1, stem="cifar")),
    "MobileNetV2": Network(_mobilenet(models.mobilenet_v1_shaped)),
    **{f"RMNet {depth}": Network(_rmnet_by_depth(depth, _FIGURE5_PART)) for depth in FIGURE5_DEPTHS},
    **{f"RepVGG {depth}": Network(_repvgg_by_depth(depth)) for depth in FIGURE5_DEPTHS},
}
