"""Blocks with gates: of a squeeze-excite, of a position, of a maximum; in a branch, over one, from the fork."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from block import Block, SqueezeExcite, net
from nets import cbn, cbr, conv
from torch import Tensor, nn


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


def _masked(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    return x + m.b(y * (y > 0.3)) * (m.pool(x) > 0)


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


def wavenet_forward(m: Any, x: Tensor) -> Tensor:
    """Every layer but the last adds to what the next one reads, and each to the output."""
    skip = torch.zeros_like(x)
    for f, g, k, r in zip(m.f, m.g, m.k, [*m.r, None], strict=True):
        z = torch.tanh(f(x)) * torch.sigmoid(g(x))
        skip, x = skip + k(z), x if r is None else x + r(z)
    return skip


def _causal_wavenet(m: Any, x: Tensor) -> Tensor:
    """The same, padded in front: by a layer that both convolutions read."""
    skip: Any = 0
    for f, g, k, r in zip(m.f, m.g, m.k, [*m.r, None], strict=True):
        y = nn.functional.pad(x, (2, 0))
        z = torch.tanh(f(y)) * torch.sigmoid(g(y))
        skip, x = skip + k(z), x if r is None else x + r(z)
    return skip


def _one_conv_for_both(m: Any, x: Tensor) -> Tensor:
    """The WaveNet of VITS: one convolution for value and gate, one for both sums, masked."""
    mask = x[:, :1] > -4
    skip = torch.zeros_like(x)
    x = m.first(x) * mask
    for i, r in zip(m.i, m.r, strict=True):
        y = i(x)
        y = r(torch.tanh(y[:, :6]) * torch.sigmoid(y[:, 6:]))
        skip = skip + y[:, -6:]
        x = (x + y[:, :6]) * mask if y.shape[1] > 6 else x
    return skip


def convs(count: int, *conv1d: Any) -> Callable[[], nn.ModuleList]:
    return lambda: nn.ModuleList(nn.Conv1d(6, 6, *conv1d) for _ in range(count))


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
    "masks": Block(
        net(_masked, a=lambda: cbn(6, 4), b=lambda: cbn(4, 6), pool=lambda: nn.AdaptiveAvgPool2d(1))
    ),
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
    "wavenet": Block(
        net(wavenet_forward, f=convs(3, 3, 1, 2, 2), g=convs(3, 3, 1, 2, 2), k=convs(3, 1), r=convs(2, 1)), 4,
        shape=(2, 6, 11),
    ),
    "wavenet, causal": Block(
        net(_causal_wavenet, f=convs(2, 3), g=convs(2, 3), k=convs(2, 1), r=convs(1, 1)), 2, shape=(2, 6, 11)
    ),
    "wavenet of one convolution for both": Block(
        net(
            _one_conv_for_both, first=lambda: conv(6, 6, dim=1),
            i=lambda: nn.ModuleList(conv(6, 12, dim=1) for _ in range(3)),
            r=lambda: nn.ModuleList(conv(6, c, 1, dim=1) for c in (12, 12, 6)),
        ), 4, shape=(2, 6, 11),
    ),
}  # fmt: skip
