"""Blocks with sums inside of sums, of branches of unequal depth, around pools, and with sizes read inside."""

from __future__ import annotations

from typing import Any

import torch
from block import Block, net
from nets import cbn, cbr, conv, plain_branch
from torch import Tensor, nn


def _three_ways(m: Any, x: Tensor) -> Tensor:
    return m.a(x) + m.b(x) + x + m.c(x)


def _snake(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return x + m.b(y + (y * (m.p + 0.5)).sin() ** 2 / (m.p + 0.5))


def _deep(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    z = y + m.b(y).relu()
    w = z + m.c(z).relu()
    return x + m.d(w) + y


def _read_by_both(m: Any, x: Tensor) -> Tensor:
    y = x + m.a(x).relu()
    return m.b(y).relu() + m.c(y.tanh())


def _doubled(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.b(y + y) + x


def _dense_sums(m: Any, x: Tensor) -> Tensor:
    """Every layer adds to all before: no sum but the last has two paths from one tensor that nothing else reads."""
    first = m.a(x).relu()
    second = m.b(first + x).relu()
    return m.c(second + first + x).relu() + second


def _resnet_d(m: Any, x: Tensor) -> Tensor:
    return (m.branch(x) + m.shortcut(m.pool(x))).relu()


def _pooled(m: Any, x: Tensor) -> Tensor:
    return m.pool(m.a(x).relu()) + m.other(m.c(x))


def _up_and_down(m: Any, x: Tensor) -> Tensor:
    return m.up(m.a(x).relu()) + m.other(m.c(x))


def _sizes_inside(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    rows, other = y.shape[2], m.d(x)[:, :, : y.size(3)]
    z = m.c(x) + m.b(y)
    return z.reshape(y.shape[0], -1, rows, z.shape[3]) * other.mean((1, 2, 3), keepdim=True)


def _size_of_a_gate(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    pooled = m.pool(y)
    count = pooled.shape[2]
    return (m.b(y) * m.gate(pooled).sigmoid() + x) * count


SUMS: dict[str, Block] = {
    "three ways": Block(
        net(_three_ways, a=plain_branch, b=lambda: nn.Sequential(plain_branch(), nn.ReLU(), conv(6, 6)),
            c=lambda: conv(6, 6, 1)), 3
    ),
    "functions of elements": Block(
        net(lambda m, x: x + m.b(m.a(x).sin().square()), a=lambda: cbn(6, 5), b=lambda: cbn(5, 6))
    ),
    "snake": Block(
        net(_snake, a=lambda: cbn(6, 5), b=lambda: cbn(5, 6), p=lambda: nn.Parameter(torch.rand(5, 1, 1))), 2
    ),
    "deep": Block(net(_deep, a=lambda: cbn(6, 6), b=lambda: cbn(6, 6), c=lambda: cbn(6, 6), d=lambda: conv(6, 6)), 4),
    "read by both": Block(net(_read_by_both, a=lambda: cbn(6, 6), b=lambda: cbn(6, 4), c=lambda: conv(6, 4, 1)), 2),
    "x + x": Block(net(_doubled, a=lambda: cbn(6, 4), b=lambda: cbn(4, 6)), 2),
    "dense": Block(net(_dense_sums, a=lambda: cbn(6, 6), b=lambda: cbn(6, 6), c=lambda: cbn(6, 6)), 4),
    "unequal depth": Block(
        net(
            lambda m, x: m.a(x) + m.b(x),
            a=lambda: nn.Sequential(cbr(6, 4), cbr(4, 4), cbr(4, 5), cbn(5, 6)),
            b=lambda: nn.Sequential(cbr(6, 3, 1), cbn(3, 6, 5)),
        )
    ),
    "resnet-d": Block(
        net(_resnet_d, branch=lambda: nn.Sequential(cbr(6, 4, 1), cbr(4, 4, 3, 2), cbn(4, 8, 1)),
            pool=lambda: nn.AvgPool2d(2, 2), shortcut=lambda: cbn(6, 8, 1)), shape=(2, 6, 8, 10)
    ),
    "space to depth": Block(
        net(lambda m, x: m.branch(x) + m.shortcut(x), shortcut=lambda: nn.PixelUnshuffle(2),
            branch=lambda: nn.Sequential(cbr(6, 4), cbn(4, 24, 3, 2))), shape=(2, 6, 8, 10)
    ),
    "space to depth in the branch": Block(
        net(lambda m, x: m.branch(x) + m.shortcut(x), shortcut=lambda: cbn(6, 8, 3, 2),
            branch=lambda: nn.Sequential(cbr(6, 2), nn.PixelUnshuffle(2), nn.ReLU(), cbn(8, 8))), shape=(2, 6, 8, 10)
    ),
    "sizes read inside": Block(
        net(_sizes_inside, a=lambda: cbr(6, 4, 3, 2), b=lambda: cbn(4, 4), c=lambda: cbn(6, 4, 1, 2),
            d=lambda: cbn(6, 4))
    ),
    "a size read off a gate": Block(
        net(_size_of_a_gate, a=lambda: cbr(6, 4), b=lambda: cbn(4, 6), pool=lambda: nn.AdaptiveAvgPool2d(1),
            gate=lambda: conv(4, 6, 1))
    ),
    "max-pools in both": Block(
        net(_pooled, a=lambda: cbn(6, 4), c=lambda: cbn(6, 4, 1), pool=lambda: nn.MaxPool2d(3, 2, 1),
            other=lambda: nn.MaxPool2d(3, 2, 1))
    ),
    "layers behind max-pools": Block(
        net(
            lambda m, x: m.d(m.b(m.pool(m.a(x))).relu()) + m.pool(m.c(x)),
            a=lambda: cbn(6, 4),
            b=lambda: cbn(4, 5),
            c=lambda: cbn(6, 4, 1),
            d=lambda: cbn(5, 4),
            pool=lambda: nn.MaxPool2d(2, 2),
        )
    ),
    "upsampling in both": Block(
        net(_up_and_down, a=lambda: cbn(6, 4), c=lambda: cbn(6, 4, 1), up=lambda: nn.Upsample(scale_factor=2),
            other=lambda: nn.Upsample(scale_factor=2))
    ),
}  # fmt: skip
