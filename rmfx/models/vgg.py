"""VGG (Simonyan & Zisserman 2015), the plain network: 3x3 convs, ReLUs and max-pools. VGG-16 is in the paper's Table 1.

Its layers are those of torchvision; for 32x32 images one linear layer follows the convs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rmfx.models.layers import check_depths, check_positive, conv_bn_relu, init_weights

VGG_WIDTHS = (64, 128, 256, 512, 512)
VGG16_DEPTHS = (2, 2, 3, 3, 3)


class VGG(nn.Module):
    """Convs and a classifier: ``[N, in_channels, H, W]`` to ``[N, num_classes]``; build it with :func:`vgg`.

    Args:
        features: maps the input to ``[N, channels, h, w]``.
        pool: to a size that does not depend on the input's.
        classifier: maps the flattened pixels to ``[N, num_classes]``.
    """

    def __init__(self, features: nn.Module, pool: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.pool = pool
        self.flatten = nn.Flatten()
        self.classifier = classifier
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.pool(self.features(x))))


def vgg(
    depths: Sequence[int],
    *,
    widths: Sequence[int] = VGG_WIDTHS,
    hidden: int | None = 4096,
    batch_norm: bool = False,
    num_classes: int = 1000,
    in_channels: int = 3,
) -> VGG:
    """Build a VGG.

    Args:
        depths: number of convs in each stage; a 2x2 max-pool ends a stage.
        widths: channels of each stage.
        hidden: width of the two hidden linear layers behind 7x7 pixels, or None: one linear layer behind the mean.
        batch_norm: behind each conv, instead of a bias.
        num_classes, in_channels: widths of the network's output and input.

    Raises:
        UnsupportedModelError: for depths or widths of which no such network can be made.

    >>> import torch
    >>> vgg((1, 1), widths=(8, 16), hidden=None, batch_norm=True).eval()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 1000])
    """
    check_depths("vgg", depths, len(widths))
    check_positive("vgg", widths=min(widths), num_classes=num_classes, in_channels=in_channels)
    layers: list[nn.Module] = []
    width = in_channels
    for out, depth in zip(widths, depths, strict=True):
        for _ in range(depth):
            plain = nn.Sequential(nn.Conv2d(width, out, 3, padding=1), nn.ReLU())
            layers += conv_bn_relu(width, out, 3) if batch_norm else plain
            width = out
        layers.append(nn.MaxPool2d(2))
    if hidden is None:
        return VGG(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Linear(width, num_classes))
    check_positive("vgg", hidden=hidden)
    classifier = nn.Sequential(
        *(nn.Linear(width * 49, hidden), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout()),
        nn.Linear(hidden, num_classes),
    )
    return VGG(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(7), classifier)


def vgg16(num_classes: int = 1000, *, batch_norm: bool = False) -> VGG:
    """VGG-16: 138.36 M parameters, 15.47 G MACs at 224x224."""
    return vgg(VGG16_DEPTHS, batch_norm=batch_norm, num_classes=num_classes)


def vgg16_bn(num_classes: int = 1000) -> VGG:
    """VGG-16 with batch norms."""
    return vgg16(num_classes, batch_norm=True)


def vgg16_cifar(num_classes: int = 10, *, in_channels: int = 3) -> VGG:
    """VGG-16 for 32x32 images, with batch norms and one linear layer: 14.7 M parameters."""
    return vgg(VGG16_DEPTHS, hidden=None, batch_norm=True, num_classes=num_classes, in_channels=in_channels)
