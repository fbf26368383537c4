"""Random residual networks: kernels, strides, groups, paddings, norms, activations, nesting, signs, scales.

Only ``random.Random`` decides, so a seed names a network for ever.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from torch import Tensor, nn

ACTIVATIONS: tuple[Callable[[int], nn.Module], ...] = (
    lambda c: nn.ReLU(),
    lambda c: nn.ReLU(),
    lambda c: nn.ReLU6(),
    lambda c: nn.Hardtanh(-1.0, 2.0),
    lambda c: nn.LeakyReLU(0.1),
    lambda c: nn.PReLU(),
    lambda c: nn.PReLU(c),
    lambda c: nn.Hardswish(),
    lambda c: nn.GELU(),
    lambda c: nn.Tanh(),
    lambda c: nn.Softplus(),
)


class Join(nn.Module):
    """Sums and differences of scaled branches."""

    def __init__(self, branches: list[nn.Module], kind: str, scale: float) -> None:
        super().__init__()
        self.branches, self.kind, self.scale = nn.ModuleList(branches), kind, scale

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in list(self.branches)[1:]:
            y = branch(x) if self.scale == 1 else self.scale * branch(x)
            total = total + y if self.kind == "add" else total - y if self.kind == "sub" else y - total
        return total


def network(seed: int) -> nn.Module:
    """A stem and one or two blocks, from 3 channels. Not every one can run: branches may differ in size."""
    r = random.Random(seed)
    width = r.choice([4, 6])
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
    if r.random() < 0.6:
        layers.append(_activation(r, width))
    for _ in range(r.randint(1, 2)):
        wider = r.choice([width, width, 4, 8])
        layers.append(_block(r, width, wider, r.choice([1, 1, 2]), depth=1))
        width = wider
    return nn.Sequential(*layers)


def _activation(r: random.Random, channels: int) -> nn.Module:
    return r.choice(ACTIVATIONS)(channels)


def _conv(r: random.Random, c_in: int, c_out: int, stride: int) -> nn.Module:
    kernel, dilation = r.choice([1, 1, 3, 3, 5, 2, 4]), r.choice([1, 1, 1, 2])
    groups = r.choice([g for g in (1, 1, 2, 4, c_in) if c_in % g == 0 and c_out % g == 0])
    padding: int | str = dilation * (kernel // 2)
    if kernel % 2 == 0:
        padding = "same" if stride == 1 and r.random() < 0.5 else r.choice([kernel // 2, kernel // 2 - 1])
    mode = r.choice(["zeros"] * 5 + ["reflect", "replicate", "circular"])
    return nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, groups, r.random() < 0.5, mode)


def _chain(r: random.Random, c_in: int, c_out: int, stride: int, depth: int) -> nn.Module:
    layers: list[nn.Module] = []
    length, width = r.randint(1, 3), c_in
    strided = r.randrange(length)
    for i in range(length):
        wider = c_out if i == length - 1 else r.choice([2, 4, 6, 8])
        if r.random() < 0.2:
            layers.append(nn.BatchNorm2d(width))
        if i == 0 and r.random() < 0.2:
            layers.append(_activation(r, width))
        layers.append(_conv(r, width, wider, stride if i == strided else 1))
        width = wider
        if r.random() < 0.4:
            layers.append(nn.BatchNorm2d(width))
        if i < length - 1 or r.random() < 0.2:
            if r.random() < 0.8:
                layers.append(_activation(r, width))
            if depth and r.random() < 0.25:
                layers.append(_block(r, width, width, 1, depth - 1))
    return nn.Sequential(*layers)


def _shortcut(r: random.Random, c_in: int, c_out: int, stride: int, depth: int) -> nn.Module:
    if (c_in, stride) == (c_out, 1) and r.random() < 0.6:
        return nn.Identity()
    kind = r.random()
    if kind < 0.5:
        norm = [nn.BatchNorm2d(c_out)] if r.random() < 0.5 else []
        return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=r.random() < 0.5), *norm)
    if kind < 0.7:
        pool = nn.AvgPool2d(stride) if stride > 1 else nn.AvgPool2d(3, 1, 1)
        return nn.Sequential(pool, nn.Conv2d(c_in, c_out, 1))
    return _chain(r, c_in, c_out, stride, depth)


def _block(r: random.Random, c_in: int, c_out: int, stride: int, depth: int) -> nn.Module:
    branches = [_chain(r, c_in, c_out, stride, depth), _shortcut(r, c_in, c_out, stride, depth)]
    if r.random() < 0.2:
        branches.append(_shortcut(r, c_in, c_out, stride, 0))
    if r.random() < 0.3:
        branches.reverse()
    join = Join(branches, r.choice(["add", "add", "sub", "reversed"]), r.choice([1, 1, 0.3, -2]))
    return nn.Sequential(join, _activation(r, c_out)) if r.random() < 0.5 else join
