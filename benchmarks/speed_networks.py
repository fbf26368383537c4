"""The networks of ``benchmarks.speed``: two zoos, networks with training-time branches, and hand-written blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rmfx.vision import import_timm, import_torchvision

ZOO = (
    *(f"torchvision:{name}" for name in ("resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2")),
    *(f"torchvision:{name}" for name in ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet0_5")),
    *(f"torchvision:{name}" for name in ("mnasnet1_0", "efficientnet_b0", "regnet_x_400mf", "regnet_y_400mf")),
    *(f"torchvision:{name}" for name in ("densenet121", "googlenet", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0")),
    *(f"torchvision:{name}" for name in ("squeezenet1_1", "inception_v3")),
    *(f"timm:{name}" for name in ("resnet26d", "resnetrs50", "seresnet33ts", "mobilenetv2_050", "lcnet_050")),
    *(f"timm:{name}" for name in ("mobilenetv3_small_050", "mnasnet_small", "efficientnet_lite0", "tinynet_e")),
    *(f"timm:{name}" for name in ("ghostnet_100", "fbnetc_100", "spnasnet_100", "semnasnet_075", "hardcorenas_a")),
    *(f"timm:{name}" for name in ("rexnet_100", "mixnet_s", "dla34", "cspresnet50", "selecsls42b")),
    *(f"timm:{name}" for name in ("repvgg_a0", "hrnet_w18_small")),
)
BRANCHED = tuple(
    f"timm:{name}" for name in ("repvgg_a0", "mobileone_s0", "fastvit_t8", "repvit_m0_9", "repghostnet_050")
)
BACKEND = (
    *(f"torchvision:{name}" for name in ("resnet18", "mobilenet_v2", "mnasnet0_5", "mobilenet_v3_small")),
    *(f"torchvision:{name}" for name in ("regnet_x_400mf", "squeezenet1_1", "shufflenet_v2_x0_5")),
    *(f"timm:{name}" for name in ("mobilenetv2_050", "repvgg_a0", "lcnet_050")),
)
HAND_WRITTEN = ("dbb", "acnet")


def build(name: str) -> nn.Module:
    """The network in eval mode, with random weights of a fixed seed."""
    torch.manual_seed(0)
    if name in HAND_WRITTEN:
        block = DiverseBranch if name == "dbb" else AsymmetricBranch
        return nn.Sequential(*(layer for _ in range(6) for layer in (block(64), nn.ReLU()))).eval()
    zoo, _, network = name.partition(":")
    if zoo == "timm":
        model: nn.Module = import_timm().create_model(network, pretrained=False)
    else:
        options = {"init_weights": False} if network in ("googlenet", "inception_v3") else {}
        model = getattr(import_torchvision().models, network)(weights=None, **options)
    return model.eval()


class DiverseBranch(nn.Module):
    """A block of DBB: 3x3, 1x1, 1x1 and 3x3 in a row, 1x1 and an average pool in a row, each with its norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.square = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.point = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.row = nn.Sequential(
            nn.Conv2d(width, width, 1, bias=False),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.pool = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.square(x) + self.point(x) + self.row(x) + self.pool(x)


class AsymmetricBranch(nn.Module):
    """A block of ACNet: 3x3, 3x1 and 1x3, each with its norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        shapes = (((3, 3), (1, 1)), ((3, 1), (1, 0)), ((1, 3), (0, 1)))
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, kernel, padding=padding, bias=False), nn.BatchNorm2d(width))
            for kernel, padding in shapes
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = (branch(x) for branch in self.branches)
        return first + second + third
