"""Leaky ReLUs that are written as a choice are leaky ReLUs, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from front import Lambda, hostile, image, operations
from nets import conv
from torch import Tensor, nn

import rmfx
from rmfx.front.trace import trace
from rmfx.passes.normalise import normalise

LEAKY: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "where": (lambda y: torch.where(y > 0, y, 0.1 * y), "LeakyReLU"),
    "where as a method": (lambda y: y.where(y >= 0, y * -0.3), "LeakyReLU"),
    "where below": (lambda y: torch.where(y < 0, 0.2 * y, y), "LeakyReLU"),
    "where of zero": (lambda y: torch.where(y.gt(0), y, 0.0), "ReLU"),
    "maximum": (lambda y: torch.maximum(y, y * 0.25), "LeakyReLU"),
    "max": (lambda y: torch.max(0.25 * y, y), "LeakyReLU"),
    "masked_fill": (lambda y: y.masked_fill(y <= 0, 0), "ReLU"),
}
OTHERS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "another bound": (lambda y: torch.where(y > 1, y, 0.1 * y), "where"),
    "another tensor": (lambda y: torch.where(y > 0, y, 0.1 * y.abs()), "where"),
    "a multiple above": (lambda y: torch.where(y > 0, 2 * y, y), "where"),
    "a shift": (lambda y: torch.where(y > 0, y, 0.1 * y + 1), "where"),
    "too steep": (lambda y: torch.maximum(y, y * 3), "maximum"),
    "falling": (lambda y: torch.maximum(y, y * -0.5), "maximum"),
    "equality": (lambda y: torch.where(y == 0, y, 0.1 * y), "where"),
    "filled above": (lambda y: y.masked_fill(y > 0, 0), "masked_fill"),
    "filled with a number": (lambda y: y.masked_fill(y < 0, 1.0), "masked_fill"),
}


@pytest.mark.parametrize("name", [*LEAKY, *OTHERS])
def test_choices(name: str) -> None:
    function, expected = {**LEAKY, **OTHERS}[name]
    model = Lambda(lambda m, x: function(m.conv(x)), conv=conv(4, 4)).double().eval()
    for x in (image().double(), hostile(2, 4, 6, 5)):
        gm = normalise(trace(model), inputs=(x,))
        assert operations(gm)[-1] == expected and (name in OTHERS or len(operations(gm)) == 2)
        torch.testing.assert_close(gm(x), model(x), rtol=0, atol=1e-12)


def test_blocks_with_choices_lose_their_shortcuts() -> None:
    model = Lambda(lambda m, x: x + m.b((lambda y: torch.maximum(y, 0.1 * y))(m.a(x))), a=conv(4, 6), b=conv(6, 4))
    model, x = model.double().eval(), hostile(2, 4, 9, 7)
    plain = rmfx.convert(model, x)
    assert rmfx.report(plain).count("removed") == 1
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=1e-11)


def test_integers_and_slopes_that_train_stay() -> None:
    whole = normalise(trace(Lambda(lambda m, x: torch.maximum(x, x * 1)).eval()))
    assert operations(whole) != ["LeakyReLU"]
    slope = nn.Parameter(torch.tensor(0.1))
    trains = Lambda(lambda m, x: (lambda y: torch.maximum(y, m.k * y))(m.conv(x)), k=slope, conv=conv(4, 4))
    assert "maximum" in operations(normalise(trace(trains.eval())))
