"""What the tables of blocks are made of: a block and what is expected of it, networks of a function, squeeze-excite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from front import Lambda
from nets import conv
from torch import Tensor, nn


def net(forward: Callable[[Any, Tensor], Any], **layers: Any) -> Callable[[], nn.Module]:
    """A model of ``forward``, with fresh layers each time: ``layers`` gives functions that make them."""
    return lambda: Lambda(forward, **{name: make() for name, make in layers.items()})


@dataclass(frozen=True)
class Block:
    """A block, an input for it, its residual sums and those that go (``None``: all)."""

    build: Callable[[], nn.Module]
    sums: int = 1
    removed: int | None = None
    shape: tuple[int, ...] = (2, 6, 7, 9)

    @property
    def gone(self) -> int:
        """How many sums go."""
        return self.sums if self.removed is None else self.removed


class SqueezeExcite(nn.Module):
    """``x * gate(expand(act(reduce(mean(x)))))``, as a module."""

    def __init__(self, c: int, gate: nn.Module | None = None, dim: int = 2) -> None:
        super().__init__()
        pools = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
        self.pool = pools[dim](1)
        self.reduce, self.act = conv(c, 2, 1, bias=True, dim=dim), nn.ReLU()
        self.expand, self.gate = conv(2, c, 1, bias=True, dim=dim), gate or nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(self.pool(x)))))
