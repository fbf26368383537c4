"""Code that cannot be followed is refused, with file and line; so are networks that change from call to call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from front import Lambda, assert_exact, image
from torch import Tensor, nn

from rmfx.errors import TraceError
from rmfx.front.trace import trace


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


def _branch(m: Lambda, x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x
    return -x


def _loop(m: Lambda, x: Tensor) -> Tensor:
    total = 0
    for row in x:
        total = total + row
    return total


def _length(m: Lambda, x: Tensor) -> Tensor:
    return x * len(x)


def _item_write(m: Lambda, x: Tensor) -> Tensor:
    y = x * 2
    y[:, 0] = 0.0
    return y


def _item_add(m: Lambda, x: Tensor) -> Tensor:
    y = x * 2
    y[:, :2] += x[:, :2]
    return y


def _attribute_write(m: Lambda, x: Tensor) -> Tensor:
    y = x * 2
    y.data = x
    return y


def _deletion(m: Lambda, x: Tensor) -> Tensor:
    del x[0]
    return x


def _raises(m: Lambda, x: Tensor) -> Tensor:
    raise KeyError("no such stage")


@pytest.mark.parametrize(
    ("forward", "line", "message"),
    [
        (_branch, 1, "symbolically traced variables cannot be used as inputs to control flow"),
        (_loop, 2, "Proxy object cannot be iterated"),
        (_length, 1, "'len' is not supported"),
        (_item_write, 2, r"a write into a part of a tensor, x\[...\] = value"),
        (_item_add, 2, r"a write into a part of a tensor, x\[...\] = value"),
        (_attribute_write, 2, "setting the attribute .data"),
        (_deletion, 1, r"del x\[...\]"),
        (_raises, 1, "no such stage"),
    ],
)
def test_trace_errors_name_file_and_line(forward: Any, line: int, message: str) -> None:
    model = nn.Sequential(conv(), Lambda(forward)).eval()
    with pytest.raises(TraceError, match=message) as caught:
        trace(model)
    assert f"{__file__}:{forward.__code__.co_firstlineno + line} cannot be followed" in str(caught.value)
    assert "decide with Python values" in str(caught.value)
    assert caught.value.__cause__ is not None


def _add_one(m: Lambda) -> None:
    m.count = m.count + 1


def _iadd_one(m: Lambda) -> None:
    m.count += 1


def _add_in_place(m: Lambda) -> None:
    m.count.add_(1)


@pytest.mark.parametrize("update", [_add_one, _iadd_one])
def test_a_buffer_that_changes_on_every_call_is_refused(update: Any) -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        update(m)
        return x * m.count

    model = nn.Sequential(Lambda(forward, count=torch.ones(5))).eval()
    with pytest.raises(
        TraceError, match=r"forward of Sequential changes 0.count, so the model computes something else"
    ):
        trace(model)
    assert torch.equal(model[0].count, torch.ones(5))


@pytest.mark.parametrize("update", [_add_one, _iadd_one, _add_in_place])
def test_an_attribute_that_changes_on_every_call_is_refused(update: Any) -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        update(m)
        return x * m.count

    model = Lambda(forward).eval()
    model.count = torch.ones(5)
    with pytest.raises(TraceError, match="forward of Lambda changes count"):
        trace(model)
    assert torch.equal(model.count, torch.ones(5))


def test_a_state_fed_back_is_refused() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        m.state = x + m.state
        return m.state

    model = Lambda(forward).eval()
    model.state = torch.ones(5)
    with pytest.raises(TraceError, match="forward of Lambda changes state"):
        trace(model)


def test_a_remembered_activation_does_no_harm() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        m.features = x * 2
        return m.features + 1

    model = Lambda(forward).double().eval()
    model(image())
    assert_exact(model, image())
