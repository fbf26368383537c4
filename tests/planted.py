"""Networks with dead and constant channels planted in them, and the widths that are left."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from one_pass import Case
from torch import Tensor, fx, nn

Plant = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Planted(Case):
    """A case whose weights are changed behind the randomisation, and the widths that the pass must leave."""

    plant: Plant = lambda model: None
    widths: tuple[int, ...] = ()

    def model(self) -> tuple[nn.Module, Tensor]:
        model, x = super().model()
        with torch.no_grad():
            self.plant(model)
        return model, x


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    """The layers in sequence."""
    return lambda: nn.Sequential(*copy.deepcopy(layers))


def constant(layer: int, rows: Sequence[int], value: float = 0.7) -> Plant:
    """Output channels ``rows`` of a layer do not depend on its input."""

    def plant(model: nn.Module) -> None:
        model[layer].weight[rows] = 0.0
        if model[layer].bias is not None:
            model[layer].bias[rows] = value

    return plant


def dead(layer: int, columns: Sequence[int]) -> Plant:
    """A layer does not read the channels ``columns``."""

    def plant(model: nn.Module) -> None:
        model[layer].weight[:, columns] = 0.0

    return plant


def both(*plants: Plant) -> Plant:
    """One after the other."""

    def plant(model: nn.Module) -> None:
        for one in plants:
            one(model)

    return plant


def widths(gm: fx.GraphModule) -> tuple[int, ...]:
    """Output channels of all layers that mix channels."""
    mixing = [m for m in gm.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)]
    return tuple(getattr(m, "out_channels", None) or m.out_features for m in mixing)
