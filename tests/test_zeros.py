"""Sums that begin with zeros: gone where shapes and types agree, else left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from front import Lambda, hostile, normal_form, operations
from oracle import assert_equivalent
from torch import Tensor, nn

import rmfx

C: dict[str, Any] = {"a": nn.Conv2d(6, 6, 3, padding=1), "narrow": nn.Conv2d(6, 1, 1)}


def _loop(m: Any, x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for _ in range(2):
        x = m.a(x).relu()
        total = total + x
    return total


def _in_place(m: Any, x: Tensor) -> Tensor:
    total = x.new_zeros(x.shape)
    total += m.a(x)
    return m.a(x).tanh() + total


DROPPED = {
    "a loop": _loop,
    "in place": _in_place,
    "of sizes": lambda m, x: m.a(x) + torch.zeros(x.shape[0], 6, x.shape[2], x.shape[3], dtype=x.dtype),
}
LEFT = {
    "stretched": lambda m, x: torch.zeros_like(x) + m.narrow(x),
    "stretched at other sizes": lambda m, x: torch.zeros_like(x) + m.a(x).mean((2, 3), keepdim=True),
    "of a wider type": lambda m, x: torch.zeros_like(x, dtype=torch.float64) + m.a(x).float(),
    "ones": lambda m, x: torch.ones_like(x) + m.a(x),
}


@pytest.mark.parametrize("name", DROPPED)
def test_dropped(name: str) -> None:
    model, x = Lambda(DROPPED[name], **C).double().eval(), hostile(2, 6, 7, 9)
    converted = rmfx.convert(model, x, policy=[])
    assert not {"zeros_like", "new_zeros", "zeros"} & set(operations(converted))
    assert_equivalent(model, converted, x)
    assert_equivalent(model, converted, hostile(3, 6, 7, 9, seed=1))


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    model, x = Lambda(LEFT[name], **C).double().eval(), hostile(2, 6, 7, 9)
    if name == "of a wider type":
        model, x = model.float(), x.float()
    if name == "stretched at other sizes":
        x = x[:, :, :1, :1]
    converted = rmfx.convert(model, x, policy=[], verify=False)
    assert len([node for node in converted.graph.nodes if node.target in ("zeros_like", torch.zeros_like)]) <= 1
    with torch.no_grad():
        for size in (x, hostile(2, 6, 5, 4, seed=1)):
            given = size.to(next(model.parameters()).dtype)
            assert torch.allclose(converted(given), model(given)) and converted(given).shape == model(given).shape
            assert converted(given).dtype == model(given).dtype


def test_a_number_is_no_tensor_of_zeros() -> None:
    """It may change the type of the result."""
    model = Lambda(lambda m, x: m.a(x) * ((x > 0).long() + 0.0), **C).double().eval()
    x = hostile(2, 6, 7, 9)
    converted = rmfx.convert(model, x, policy=[])
    assert_equivalent(model, converted, x)
    whole = Lambda(lambda m, x: (m.a(x), (x > 0).long() + 0.0), **C).double().eval()
    assert [value.dtype for value in rmfx.convert(whole, x, policy=[])(x)] == [torch.float64, torch.float32]


def test_without_example_inputs_nothing_is_known() -> None:
    model = Lambda(_loop, **C).double().eval()
    assert any("zeros_like" in name for name in operations(normal_form(model)))
