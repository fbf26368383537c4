"""Blocks of published networks whose regions are no two chains: gates, slices, concats, pools, sums inside of sums.

Each is small, behind no stem, and takes signed images. ``BLOCKS`` says of each how many residual sums there are, and
how many of them go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from front import Lambda
from nets import cbn, cbr, conv, plain_branch
from torch import Tensor, nn


def net(forward: Callable[[Any, Tensor], Any], **layers: Any) -> Callable[[], nn.Module]:
    """A model of ``forward``, with fresh layers each time: ``layers`` gives functions that make them."""
    return lambda: Lambda(forward, **{name: make() for name, make in layers.items()})


# -- gates ------------------------------------------------------------------------------------------------------------


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


class LinearSqueezeExcite(nn.Module):
    """The first squeeze-excite: linear layers on pooled features, spread over the image by a view."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c, 2), nn.Linear(2, c)

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        y = torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean((2, 3))))))
        return x * y.view(b, c, 1, 1).expand_as(x)


class EfficientChannelAttention(nn.Module):
    """ECA: a convolution over the channels of the pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.conv = nn.AdaptiveAvgPool2d(1), nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.pool(x).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(y)


def _inline_se(m: Any, x: Tensor) -> Tensor:
    y = m.act(m.a(x))
    s = y.mean((2, 3), keepdim=True)
    s = m.expand(torch.relu(m.reduce(s))).sigmoid()
    return x + m.b(s * y)


def _spatial_gate(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return x + y * m.mask(y).sigmoid()


def _full_gate(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return x + m.b(y) * torch.sigmoid(m.c(y))


def _region_gate(m: Any, x: Tensor) -> Tensor:
    y, g = m.a(x).relu(), m.b(x).sigmoid()
    return x + m.c(y * g) + g


def _two_gates(m: Any, x: Tensor) -> Tensor:
    return x + m.se2(m.b(m.se1(m.a(x).relu())))


def _gate_and_activation(m: Any, x: Tensor) -> Tensor:
    return x + m.b(m.act(m.se(m.a(x))))


def _gate_on_the_shortcut(m: Any, x: Tensor) -> Tensor:
    return m.se(m.c(x)) + m.b(m.a(x).relu())


def _gate_from_the_fork(m: Any, x: Tensor) -> Tensor:
    return x + m.a(x).relu() * m.gate(m.pool(x))


def _gate_of_a_maximum(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    s = m.expand(m.reduce(m.mean(y)).relu()) + m.expand(m.reduce(m.top(y)).relu())
    return x + m.b(y * s.sigmoid())


def _one_gate_for_two(m: Any, x: Tensor) -> Tensor:
    y, z = m.a(x).relu(), m.b(x).relu()
    return x + m.c(torch.cat((y, z), 1) * m.gate(m.pool(x)))


# -- slices and concats -----------------------------------------------------------------------------------------------


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


# -- sums inside of sums ----------------------------------------------------------------------------------------------


def _three_ways(m: Any, x: Tensor) -> Tensor:
    return m.a(x) + m.b(x) + x + m.c(x)


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


def _maximum_of_the_fork(m: Any, x: Tensor) -> Tensor:
    return x + m.b(m.a(x).relu()).relu() * m.gate(m.top(x)).sigmoid()


def _maximum_of_a_sum(m: Any, x: Tensor) -> Tensor:
    y = x + m.a(x).relu()
    return m.c(y).relu() + m.b(x).relu() * m.gate(m.top(y)).sigmoid()


def _shared_factor(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    g = m.gate(y).sigmoid()
    return x + m.b(y * g) + m.c(m.d(x) * g)


def _gated_and_joined(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return torch.cat((x + y, m.se(y)), 1)


def _same_twice(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.b(torch.cat((y, y), 1)) + x


def _crossing_groups(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return x + m.c(torch.cat((y[:, 3:8], m.b(y).relu()[:, 1:8]), 1))


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


def _keep_bn_cut(m: Any, x: Tensor) -> Tensor:
    y = m.b(m.a(x)) + x
    return m.d(torch.cat((m.c(y[:, :2]).relu(), y[:, 2:]), 1).relu()) + x


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


def _dw(c: int, k: int, dim: int = 2) -> nn.Module:
    return cbn(c, c, k, groups=c, dim=dim)


GATES: dict[str, Block] = {
    "se after the middle": Block(
        net(
            lambda m, x: x + m.c(m.se(m.b(m.a(x)))),
            a=lambda: cbr(6, 8, 1), b=lambda: cbr(8, 8, groups=8), se=lambda: SqueezeExcite(8), c=lambda: cbn(8, 6, 1),
        )
    ),
    "se after the last": Block(
        net(
            lambda m, x: (x + m.se(m.b(m.a(x)))).relu(),
            a=lambda: cbr(6, 4), b=lambda: cbn(4, 6), se=lambda: SqueezeExcite(6),
        )
    ),
    "se inline": Block(
        net(
            _inline_se, a=lambda: cbn(6, 8), act=nn.Hardswish, reduce=lambda: conv(8, 2, 1),
            expand=lambda: conv(2, 8, 1, bias=True), b=lambda: cbn(8, 6, 1),
        )
    ),
    "se of linear layers": Block(
        net(lambda m, x: x + m.se(m.b(m.a(x))), a=lambda: cbr(6, 4), b=lambda: cbn(4, 6),
            se=lambda: LinearSqueezeExcite(6))
    ),
    "se, hard sigmoid": Block(
        net(lambda m, x: x + m.b(m.se(m.a(x).relu())), a=lambda: cbn(6, 5),
            se=lambda: SqueezeExcite(5, nn.Hardsigmoid()), b=lambda: cbn(5, 6))
    ),
    "se, another gate": Block(
        net(lambda m, x: x + m.b(m.se(m.a(x).relu())), a=lambda: cbn(6, 5),
            se=lambda: SqueezeExcite(5, nn.Tanh()), b=lambda: cbn(5, 6))
    ),
    "se, strided": Block(
        net(
            lambda m, x: m.s(x) + m.c(m.se(m.b(m.a(x)))), s=lambda: cbn(6, 4, 1, 2),
            a=lambda: cbr(6, 8, 1), b=lambda: cbr(8, 8, 3, 2, groups=8), se=lambda: SqueezeExcite(8),
            c=lambda: cbn(8, 4, 1),
        )
    ),
    "eca": Block(
        net(lambda m, x: x + m.eca(m.b(m.a(x))), a=lambda: cbr(6, 5), b=lambda: cbn(5, 6),
            eca=EfficientChannelAttention)
    ),
    "spatial": Block(net(_spatial_gate, a=lambda: cbn(6, 6), mask=lambda: conv(6, 1, 7))),
    "full": Block(net(_full_gate, a=lambda: cbn(6, 4), b=lambda: cbn(4, 6), c=lambda: cbn(4, 6, 1))),
    "a tensor of the region": Block(
        net(_region_gate, a=lambda: cbn(6, 6), b=lambda: cbn(6, 6, 1), c=lambda: cbn(6, 6, 1)), 2
    ),
    "two in one branch": Block(
        net(_two_gates, a=lambda: cbn(6, 8), b=lambda: cbn(8, 6), se1=lambda: SqueezeExcite(8),
            se2=lambda: SqueezeExcite(6, nn.Hardsigmoid()))
    ),
    "before an activation": Block(
        net(_gate_and_activation, a=lambda: cbn(6, 8), b=lambda: cbn(8, 6), se=lambda: SqueezeExcite(8), act=nn.GELU)
    ),
    "on the shortcut": Block(
        net(_gate_on_the_shortcut, a=lambda: cbn(6, 8), b=lambda: cbn(8, 4), c=lambda: cbn(6, 4, 1),
            se=lambda: SqueezeExcite(4))
    ),
    "from the fork": Block(
        net(_gate_from_the_fork, a=lambda: cbn(6, 6), pool=lambda: nn.AdaptiveAvgPool2d(1),
            gate=lambda: nn.Sequential(conv(6, 6, 1), nn.Sigmoid()))
    ),
    "cbam's": Block(
        net(_gate_of_a_maximum, a=lambda: cbn(6, 8), b=lambda: cbn(8, 6), mean=lambda: nn.AdaptiveAvgPool2d(1),
            top=lambda: nn.AdaptiveMaxPool2d(1), reduce=lambda: conv(8, 2, 1), expand=lambda: conv(2, 8, 1)), 2, 1
    ),
    "over two branches": Block(
        net(_one_gate_for_two, a=lambda: cbn(6, 3), b=lambda: cbn(6, 5, 1), c=lambda: cbn(8, 6),
            pool=lambda: nn.AdaptiveAvgPool2d(1), gate=lambda: nn.Sequential(conv(6, 8, 1), nn.Sigmoid()))
    ),
    "a maximum of the fork": Block(
        net(_maximum_of_the_fork, a=lambda: cbn(6, 5), b=lambda: cbn(5, 6), gate=lambda: conv(6, 6, 1),
            top=lambda: nn.AdaptiveMaxPool2d(1))
    ),
    "a maximum of a sum": Block(
        net(_maximum_of_a_sum, a=lambda: cbn(6, 6), b=lambda: cbn(6, 6), c=lambda: cbn(6, 6),
            gate=lambda: conv(6, 6, 1), top=lambda: nn.AdaptiveMaxPool2d(1)), 2
    ),
    "a pool": Block(net(lambda m, x: x + m.a(x).relu() * m.pool(x), a=lambda: cbn(6, 6),
                        pool=lambda: nn.AdaptiveAvgPool2d(1))),
    "for two products": Block(
        net(_shared_factor, a=lambda: cbn(6, 6), b=lambda: cbn(6, 6), c=lambda: cbn(4, 6, 1), d=lambda: cbn(6, 4),
            gate=lambda: conv(6, 1, 1)), 2
    ),
    "a gated value and itself joined": Block(net(_gated_and_joined, a=lambda: cbn(6, 6), se=lambda: SqueezeExcite(6))),
    "in a gate": Block(
        net(lambda m, x: x + m.b(m.a(x).relu() * m.se(m.c(x)).sigmoid()), a=lambda: cbn(6, 5), b=lambda: cbn(5, 6),
            c=lambda: cbn(6, 5, 1), se=lambda: SqueezeExcite(5))
    ),
    "on the fork": Block(
        net(lambda m, x: m.se(x) + m.b(m.a(x).relu()), a=lambda: cbn(6, 5), b=lambda: cbn(5, 6),
            se=lambda: SqueezeExcite(6))
    ),
    "of one position": Block(
        net(lambda m, x: x + m.se(m.b(m.a(x))), a=lambda: cbr(6, 4), b=lambda: cbn(4, 6), se=lambda: SqueezeExcite(6)),
        shape=(8, 6, 1, 1),
    ),
    "tokens": Block(
        net(lambda m, x: x + m.b(m.a(x).relu() * m.g(x.mean(1, keepdim=True)).sigmoid()), a=lambda: nn.Linear(6, 8),
            b=lambda: nn.Linear(8, 6), g=lambda: nn.Linear(6, 8)), shape=(2, 5, 6),
    ),
    "tokens, one factor each": Block(
        net(lambda m, x: x + m.b(m.a(x).relu() * m.g(x).sigmoid()), a=lambda: nn.Linear(6, 8),
            b=lambda: nn.Linear(8, 6), g=lambda: nn.Linear(6, 1)), shape=(2, 5, 6),
    ),
    "tokens, pooled over features": Block(
        net(lambda m, x: x + m.a(x).relu() * m.pool(x).sigmoid(), a=lambda: nn.Linear(6, 6),
            pool=lambda: nn.AdaptiveAvgPool1d(1)), shape=(2, 5, 6),
    ),
    "features": Block(
        net(lambda m, x: x + m.b(m.a(x).relu() * m.g(x).sigmoid()), a=lambda: nn.Linear(6, 8),
            b=lambda: nn.Linear(8, 6), g=lambda: nn.Linear(6, 8)), shape=(16, 6),
    ),
    "1d": Block(
        net(lambda m, x: x + m.b(m.se(m.a(x))), a=lambda: cbr(6, 5, dim=1), se=lambda: SqueezeExcite(5, dim=1),
            b=lambda: cbn(5, 6, dim=1)),
        shape=(2, 6, 11),
    ),
    "3d": Block(
        net(lambda m, x: x + m.b(m.se(m.a(x))), a=lambda: cbr(6, 5, dim=3), se=lambda: SqueezeExcite(5, dim=3),
            b=lambda: cbn(5, 6, 1, dim=3)),
        shape=(2, 6, 3, 4, 5),
    ),
}  # fmt: skip
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
SUMS: dict[str, Block] = {
    "three ways": Block(
        net(_three_ways, a=plain_branch, b=lambda: nn.Sequential(plain_branch(), nn.ReLU(), conv(6, 6)),
            c=lambda: conv(6, 6, 1)), 3
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
BLOCKS: dict[str, Block] = {
    **{f"gate: {name}": block for name, block in GATES.items()},
    **{f"slice: {name}": block for name, block in SLICES.items()},
    **{f"sum: {name}": block for name, block in SUMS.items()},
}
