"""The networks of the paper and those it is compared with, in training form: build one, train it, convert it.

A network for 32x32 images has 10 classes unless told otherwise; all others are for ImageNet and have 1000.
"""

import inspect

from rmfx.models.cifar_resnet import cifar_resnet, resnet20, resnet32, resnet44, resnet56, resnet110, resnet1202
from rmfx.models.diracnet import diracnet, diracnet18, diracnet34, diracnet34_cifar
from rmfx.models.mobilenet import mobilenet_v1, mobilenet_v1_cifar, mobilenet_v2, mobilenet_v2_cifar
from rmfx.models.mobilenet_v1_shaped import mobilenet_v1_shaped
from rmfx.models.preact import (
    preact_resnet,
    preact_resnet18,
    preact_resnet20,
    preact_resnet50,
    preact_resnet110,
    preact_resnet164,
    preact_resnet1001,
)
from rmfx.models.repvgg import (
    repvgg,
    repvgg18,
    repvgg34,
    repvgg_a0,
    repvgg_a1,
    repvgg_a2,
    repvgg_a2_cifar,
    repvgg_b0,
    repvgg_b1,
    repvgg_b1g2,
    repvgg_b1g4,
    repvgg_b2,
    repvgg_b2g2,
    repvgg_b2g4,
    repvgg_b3,
    repvgg_b3g2,
    repvgg_b3g4,
    repvgg_by_depth,
)
from rmfx.models.resdistill import fading_resnet, resdistill34, resdistill34_cifar, resdistill50
from rmfx.models.resnet import resnet, resnet18, resnet34, resnet34_cifar, resnet50, resnet101, resnet152
from rmfx.models.rmnet import (
    rmnet,
    rmnet26x3_32,
    rmnet41x4_8,
    rmnet41x5_16,
    rmnet50x5_32,
    rmnet50x6_32,
    rmnet101x6_16,
    rmnet152x6_32,
    rmnet_by_depth,
)
from rmfx.models.vgg import vgg, vgg16, vgg16_bn, vgg16_cifar

__all__ = [
    "cifar_resnet",
    "diracnet",
    "diracnet18",
    "diracnet34",
    "diracnet34_cifar",
    "fading_resnet",
    "mobilenet_v1",
    "mobilenet_v1_cifar",
    "mobilenet_v1_shaped",
    "mobilenet_v2",
    "mobilenet_v2_cifar",
    "preact_resnet",
    "preact_resnet1001",
    "preact_resnet110",
    "preact_resnet164",
    "preact_resnet18",
    "preact_resnet20",
    "preact_resnet50",
    "repvgg",
    "repvgg18",
    "repvgg34",
    "repvgg_a0",
    "repvgg_a1",
    "repvgg_a2",
    "repvgg_a2_cifar",
    "repvgg_b0",
    "repvgg_b1",
    "repvgg_b1g2",
    "repvgg_b1g4",
    "repvgg_b2",
    "repvgg_b2g2",
    "repvgg_b2g4",
    "repvgg_b3",
    "repvgg_b3g2",
    "repvgg_b3g4",
    "repvgg_by_depth",
    "resdistill34",
    "resdistill34_cifar",
    "resdistill50",
    "resnet",
    "resnet101",
    "resnet110",
    "resnet1202",
    "resnet152",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet34_cifar",
    "resnet44",
    "resnet50",
    "resnet56",
    "rmnet",
    "rmnet101x6_16",
    "rmnet152x6_32",
    "rmnet26x3_32",
    "rmnet41x4_8",
    "rmnet41x5_16",
    "rmnet50x5_32",
    "rmnet50x6_32",
    "rmnet_by_depth",
    "vgg",
    "vgg16",
    "vgg16_bn",
    "vgg16_cifar",
]


def _for_cifar(name: str) -> bool:
    classes = inspect.signature(globals()[name]).parameters["num_classes"]
    return classes.default == 10


CIFAR = frozenset(filter(_for_cifar, __all__))  # the functions whose networks are for images of 3x32x32
