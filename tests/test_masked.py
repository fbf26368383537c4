"""Activations of some channels, written as a choice between result and input: where they are recognised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from front import Lambda, hostile, operations
from torch import Tensor, nn

from rmfx.front.normal import check_normal
from rmfx.front.trace import trace
from rmfx.passes.normalise import normalise

MASK = torch.tensor([True, False, True, False]).reshape(1, 4, 1, 1)


def found(function: Callable[[Lambda, Tensor], Tensor], mask: Tensor = MASK) -> list[str]:
    """The operations behind a convolution; the normal form is seen to give what the model gives."""
    model = Lambda(function, conv=nn.Conv2d(4, 4, 1), silu=nn.SiLU(), slopes=nn.PReLU(4)).double().eval()
    model.register_buffer("mask", mask)
    gm = normalise(trace(model))
    check_normal(gm)
    for batch in (2, 3):
        x = hostile(batch, 4, 4, 4)
        assert torch.equal(gm(x), model(x))
    return operations(gm)[1:]


def masked(m: Lambda, x: Tensor) -> Tensor:
    x = m.conv(x)
    return torch.where(m.mask, m.silu(x), x)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (4, 1, 1)])
def test_a_mask_of_the_channels(shape: tuple[int, ...]) -> None:
    assert found(masked, MASK.reshape(shape)) == ["MaskedActivation"]


def test_a_mask_of_other_axes() -> None:
    for mask in (MASK.flatten(), MASK.reshape(4, 1), MASK.expand(1, 4, 4, 1), torch.tensor(True)):
        assert "MaskedActivation" not in found(masked, mask)


def test_what_is_none() -> None:
    def swapped(m: Lambda, x: Tensor) -> Tensor:
        x = m.conv(x)
        return torch.where(m.mask, x, m.silu(x))

    def of_another(m: Lambda, x: Tensor) -> Tensor:
        return torch.where(m.mask, m.silu(m.conv(x)), x)

    def read_twice(m: Lambda, x: Tensor) -> Tensor:
        x = m.conv(x)
        y = m.silu(x)
        return torch.where(m.mask, y, x) + y

    def slopes(m: Lambda, x: Tensor) -> Tensor:
        x = m.conv(x)
        return torch.where(m.mask, m.slopes(x), x)

    def computed(m: Lambda, x: Tensor) -> Tensor:
        x = m.conv(x)
        return torch.where(x > 1, m.silu(x), x)

    for function in (swapped, of_another, read_twice, slopes, computed):
        assert "MaskedActivation" not in found(function)
