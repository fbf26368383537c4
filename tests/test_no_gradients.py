"""What matters to gradients or to randomness only is nothing, or a plain activation, in a network that only infers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from front import Lambda, assert_exact, conv, image, operations
from oracle import assert_equivalent
from torch import Tensor, nn
from torch.nn import functional as F

import rmfx
from rmfx.front.trace import trace
from rmfx.passes.normalise import normalise

BRANCHES: dict[str, Callable[[Lambda, Tensor], Tensor]] = {
    "detached input": lambda m, x: m.b(m.a(x.detach()).relu()),
    "detached inside": lambda m, x: m.b(torch.detach(m.a(x)).relu()),
    "memory format": lambda m, x: m.b(m.a(x).contiguous(memory_format=torch.channels_last).relu()),
    "rrelu": lambda m, x: m.b(F.rrelu(m.a(x))),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_connections_around_it_are_removed(name: str) -> None:
    model = Lambda(lambda m, x: (lambda y: y + BRANCHES[name](m, y))(m.c(x)), a=conv(), b=conv(), c=conv())
    model = model.double().eval()
    result = rmfx.convert(model, image())
    assert rmfx.report(result).count("removed") == 1
    assert_equivalent(model, rmfx.to_sequential(result), image())


def test_random_slopes_are_their_mean_unless_they_are_drawn() -> None:
    fixed = Lambda(lambda m, x: torch.rrelu(m.a(x), 0.25, 0.5), a=conv())
    assert operations(assert_exact(fixed, image())) == ["Conv2d", "LeakyReLU"]
    drawn = Lambda(lambda m, x: F.rrelu(m.a(x), training=True), a=conv()).eval()
    assert operations(normalise(trace(drawn))) == ["Conv2d", "rrelu"]


def test_a_network_that_will_train_goes_on_detaching() -> None:
    model = nn.Sequential(Lambda(lambda m, x: m.a(x).detach(), a=conv()), conv()).eval()
    assert operations(normalise(trace(model), keep_dropout=True)) == ["Conv2d", "detach", "Conv2d"]
    assert operations(normalise(trace(model))) == ["Conv2d", "Conv2d"]
