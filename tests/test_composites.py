"""Activations that are written out become the layer that they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from front import Lambda, conv, hostile, image, operations
from torch import Tensor, nn
from torch.nn import functional as F

from rmfx.front.normal import check_normal
from rmfx.front.trace import trace
from rmfx.passes.normalise import normalise

WRITTEN_OUT: list[tuple[Callable[[Tensor], Tensor], list[str]]] = [
    (lambda y: y * y.sigmoid(), ["SiLU"]),
    (lambda y: torch.sigmoid(y).mul(y), ["SiLU"]),
    (lambda y: y.mul_(y.sigmoid()), ["SiLU"]),
    (lambda y: y * F.hardsigmoid(y), ["Hardswish"]),
    (lambda y: y * (F.relu6(y + 3.0) / 6.0), ["Hardswish"]),
    (lambda y: y * F.relu6(y + 3) / 6, ["Hardswish"]),
    (lambda y: F.relu6(3 + y) * y * (1 / 6), ["Hardswish"]),
    (lambda y: F.relu6(y + 3).div(6), ["Hardsigmoid"]),
    (lambda y: y.add(3.0).clamp(0.0, 6.0).div(6.0), ["Hardsigmoid"]),
    (lambda y: F.relu6(2 * y + 3) / 6, ["ChannelAffine", "Hardsigmoid"]),
    (lambda y: y * F.softplus(y).tanh(), ["Mish"]),
    (lambda y: y * F.softplus(y, threshold=30).tanh(), ["Mish"]),
    (lambda y: y * torch.sigmoid(1.702 * y), ["ChannelAffine", "SiLU", "ChannelAffine"]),
    (lambda y: y * torch.sigmoid(-0.5 * y), ["ChannelAffine", "SiLU", "ChannelAffine"]),
    (lambda y: y * y, ["Elementwise"]),
    (lambda y: y * y.square(), ["Elementwise", "mul"]),
]
NOT_THOSE: list[tuple[Callable[[Tensor], Tensor], list[str]]] = [
    (lambda y: y * (y + 1).sigmoid(), ["ChannelAffine", "Sigmoid", "mul"]),
    (lambda y: y * y.tanh(), ["Tanh", "mul"]),
    (lambda y: y * F.softplus(y, 2.0).tanh(), ["Softplus", "Tanh", "mul"]),
    (lambda y: y * F.softplus(y, 1.0, 2.0).tanh(), ["Softplus", "Tanh", "mul"]),
    (lambda y: y * F.softplus(y + 1).tanh(), ["ChannelAffine", "Softplus", "Tanh", "mul"]),
    (lambda y: F.relu6(y + 3) / 5, ["ChannelAffine", "ReLU6", "ChannelAffine"]),
    (lambda y: F.relu6(y + 2) / 6, ["ChannelAffine", "ReLU6", "ChannelAffine"]),
    (lambda y: F.relu6(y - 3) / 6, ["ChannelAffine", "ReLU6", "ChannelAffine"]),
    (lambda y: (y + 1) * F.relu6(y + 3) / 6, ["ChannelAffine", "ChannelAffine", "ReLU6", "mul", "ChannelAffine"]),
]


@pytest.mark.parametrize("index", range(len(WRITTEN_OUT) + len(NOT_THOSE)))
def test_written_out_activations(index: int) -> None:
    function, expected = [*WRITTEN_OUT, *NOT_THOSE][index]
    model = Lambda(lambda m, x: function(m.conv(x)), conv=conv()).double().eval()
    for inputs in (None, (image(),)):
        gm = normalise(trace(model), inputs=inputs)
        check_normal(gm)
        assert operations(gm) == ["Conv2d", *expected]
        for x in (image(), hostile(3, 4, 2, 6, seed=3)):
            want, got = model(x), gm(x)
            assert (want - got).abs().max() <= 1e-12 * want.abs().max()


def test_whole_numbers_stay() -> None:
    model = Lambda(lambda m, x: x * x.sigmoid()).eval()
    gm = normalise(trace(model), inputs=(torch.arange(4),))
    assert operations(gm) == ["Sigmoid", "mul"]
    assert torch.equal(gm(torch.arange(4)), model(torch.arange(4)))


def test_a_gate_with_another_reader_stays_for_that_one() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        y = m.conv(x)
        gate = y.sigmoid()
        return y * gate + m.other(gate)

    gm = normalise(trace(Lambda(forward, conv=conv(), other=nn.Conv2d(4, 4, 1)).double().eval()))
    assert operations(gm) == ["Conv2d", "Sigmoid", "SiLU", "Conv2d", "add"]
