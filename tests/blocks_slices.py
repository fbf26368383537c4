"""Blocks whose branches are cut into slices of the channels and concatenated again."""

from __future__ import annotations

from typing import Any

import torch
from block import Block, SqueezeExcite, net
from nets import cbn, cbr, conv
from torch import Tensor, nn


def _inception(m: Any, x: Tensor) -> Tensor:
    return (x + m.d(torch.cat([m.a(x), m.b(m.a2(x)), m.c(x)], 1))).relu()


def _res2net(m: Any, x: Tensor) -> Tensor:
    y = m.head(x).chunk(3, 1)
    first = m.a(y[0])
    second = m.b(first + y[1])
    return (m.tail(torch.cat((first, second, y[2]), 1)) + x).relu()


def _res2net_strided(m: Any, x: Tensor) -> Tensor:
    y = torch.split(m.head(x), 2, 1)
    out = torch.cat((m.a(y[0]), m.b(y[1]), m.pool(y[2])), 1)
    return (m.tail(out) + m.shortcut(x)).relu()


def _rexnet(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.a(x).relu())
    return torch.cat([y[:, :4] + x, y[:, 4:]], 1)


def _partial_conv(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    first, rest = torch.split(x, [2, 4], dim=1)
    y = torch.cat((m.part(first), rest), 1)
    return x + m.b(m.a(y).relu())


def _mixnet(m: Any, x: Tensor) -> Tensor:
    parts = torch.split(m.head(x), [4, 2, 2], 1)
    y = torch.cat([m.a(parts[0]), m.b(parts[1]), m.c(parts[2])], 1)
    return x + m.tail(m.se(y.relu()))


def _ghost(m: Any, x: Tensor) -> Tensor:
    first = m.a(x)
    y = torch.cat([first, m.cheap(first)], dim=1)
    last = m.b(y)
    return torch.cat([last, m.cheaper(last)], dim=1) + x


def _csp(m: Any, x: Tensor) -> Tensor:
    first, second = m.split(x).chunk(2, 1)
    second = second + m.b(m.a(second))
    return m.join(torch.cat((first, second), 1))


def _dpn(m: Any, x: Tensor) -> Tensor:
    y = m.c(m.b(m.a(x)))
    s = m.shortcut(x)
    return torch.cat([s[:, :4] + y[:, :4], s[:, 4:], y[:, 4:]], 1).relu()


def _one_shot(m: Any, x: Tensor) -> Tensor:
    first = m.a(x)
    second = m.b(first)
    third = m.c(second)
    return m.join(torch.cat([x, first, second, third], 1)) + x


def _shuffled(m: Any, x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    return m.shuffle(torch.cat((first, m.b(m.a(second))), 1)) + m.c(x)


def _overlapping(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return x + torch.cat((y[:, 1:4].relu(), m.b(y[:, :3]).relu()), 1)


def _slope_parts(m: Any, x: Tensor) -> Tensor:
    first, second = m.slopes(m.a(x)).split([1, 5], 1)
    return x + m.b(torch.cat((second, first), 1))


def _clamp_parts(m: Any, x: Tensor) -> Tensor:
    y = m.act(m.a(x))
    return x + m.b(torch.cat((m.c(y[:, :2]).relu(), y[:, 2:]), 1))


def _same_twice(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.b(torch.cat((y, y), 1)) + x


def _crossing_groups(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return x + m.c(torch.cat((y[:, 3:8], m.b(y).relu()[:, 1:8]), 1))


def _keep_bn_cut(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.a(x)) + x
    return m.d(torch.cat((m.c(y[:, :2]).relu(), y[:, 2:]), 1).relu()) + x


def _dw(c: int, k: int, dim: int = 2) -> nn.Module:
    return cbn(c, c, k, groups=c, dim=dim)


SLICES: dict[str, Block] = {
    "inception": Block(
        net(_inception, a=lambda: cbr(6, 3, 1), a2=lambda: cbr(6, 2, 1), b=lambda: cbr(2, 4), c=lambda: cbr(6, 2, 5),
            d=lambda: conv(9, 6, 1, bias=True))
    ),
    "res2net": Block(
        net(_res2net, head=lambda: cbr(6, 6, 1), a=lambda: cbr(2, 2), b=lambda: cbr(2, 2), tail=lambda: cbn(6, 6, 1)), 2
    ),
    "res2net, strided": Block(
        net(_res2net_strided, head=lambda: cbr(6, 6, 1), a=lambda: cbr(2, 2, 3, 2), b=lambda: cbr(2, 2, 3, 2),
            pool=lambda: nn.AvgPool2d(3, 2, 1), tail=lambda: cbn(6, 8, 1), shortcut=lambda: cbn(6, 8, 1, 2))
    ),
    "rexnet": Block(
        net(_rexnet, a=lambda: cbn(4, 8, 1), b=lambda: cbn(8, 6, 1)), shape=(2, 4, 7, 9)
    ),
    "partial conv": Block(
        net(_partial_conv, stem=lambda: conv(6, 6, 1), part=lambda: conv(2, 2), a=lambda: cbn(6, 9, 1),
            b=lambda: conv(9, 6, 1))
    ),
    "mixnet": Block(
        net(_mixnet, head=lambda: cbr(6, 8, 1), a=lambda: _dw(4, 3), b=lambda: _dw(2, 5), c=lambda: _dw(2, 7),
            se=lambda: SqueezeExcite(8), tail=lambda: cbn(8, 6, 1))
    ),
    "ghost": Block(
        net(_ghost, a=lambda: cbr(6, 4, 1), cheap=lambda: nn.Sequential(_dw(4, 3), nn.ReLU()),
            b=lambda: cbn(8, 3, 1), cheaper=lambda: _dw(3, 3))
    ),
    "csp": Block(
        net(_csp, split=lambda: cbr(6, 8, 1), a=lambda: cbr(4, 3), b=lambda: cbr(3, 4), join=lambda: cbr(8, 6, 1))
    ),
    "dpn": Block(
        net(_dpn, a=lambda: cbr(6, 4, 1), b=lambda: cbr(4, 4, groups=2), c=lambda: cbn(4, 7, 1),
            shortcut=lambda: cbn(6, 6, 1))
    ),
    "one-shot": Block(
        net(_one_shot, a=lambda: cbr(6, 3), b=lambda: cbr(3, 3), c=lambda: cbr(3, 4), join=lambda: cbr(16, 6, 1))
    ),
    "shuffled": Block(
        net(_shuffled, a=lambda: cbr(3, 3), b=lambda: cbn(3, 3, 1), c=lambda: cbn(6, 6, 1),
            shuffle=lambda: nn.ChannelShuffle(2))
    ),
    "overlapping slices": Block(net(_overlapping, a=lambda: cbn(6, 4), b=lambda: conv(3, 3, 1))),
    "slopes of parts": Block(net(_slope_parts, a=lambda: cbn(6, 6), slopes=lambda: nn.PReLU(6), b=lambda: conv(6, 6))),
    "clamps of parts": Block(net(_clamp_parts, a=lambda: cbn(6, 5), b=lambda: conv(6, 6), c=lambda: cbn(2, 3),
            act=nn.ReLU6)),
    "the same twice": Block(net(_same_twice, a=lambda: cbn(6, 5), b=lambda: cbn(10, 6))),
    "across groups": Block(
        net(_crossing_groups, a=lambda: cbr(6, 12, 1), b=lambda: cbn(12, 8, groups=4),
            c=lambda: cbn(12, 6, 1, groups=3))
    ),
    "a cut of what a norm carries": Block(
        net(_keep_bn_cut, a=lambda: cbr(6, 5), b=lambda: cbn(5, 6), c=lambda: cbn(2, 3), d=lambda: cbn(7, 6)), 2
    ),
    "1d": Block(
        net(_res2net, head=lambda: cbr(6, 6, 1, dim=1), a=lambda: cbr(2, 2, dim=1), b=lambda: cbr(2, 2, dim=1),
            tail=lambda: cbn(6, 6, 1, dim=1)), 2, shape=(2, 6, 11),
    ),
    "3d": Block(
        net(_res2net, head=lambda: cbr(6, 6, 1, dim=3), a=lambda: cbr(2, 2, dim=3), b=lambda: cbr(2, 2, dim=3),
            tail=lambda: cbn(6, 6, 1, dim=3)), 2, shape=(2, 6, 3, 4, 5),
    ),
    "features": Block(
        net(_res2net, head=lambda: cbr(6, 6, dim=0), a=lambda: cbr(2, 2, dim=0), b=lambda: cbr(2, 2, dim=0),
            tail=lambda: cbn(6, 6, dim=0)), 2, shape=(16, 6),
    ),
}  # fmt: skip
