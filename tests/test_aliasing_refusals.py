"""In-place operations that no order of operations without them can stand for are refused, with file and line."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from front import Lambda, image, normal_form
from torch import Tensor, nn
from torch.nn import functional as F

from rmfx.errors import NormalFormError
from rmfx.front.trace import trace
from rmfx.modules import ChannelSlice
from rmfx.passes.normalise import normalise


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


def _partial(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, :2].add_(x[:, :2])
    return y


def _partial_operator(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    part = y.narrow(1, 0, 2)
    part += x[:, :2]
    return m.a(y)


def _view_read_later(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    flat = y.flatten(1)
    y.relu_()
    return flat


def _unknown_read_later(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    z = y.contiguous()
    z.relu_()
    return y + z


def _whole_split_read_later(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    first, second = y.chunk(2, 1)
    first.relu_()
    return y * 2


def _view_in_the_output(m: Lambda, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.a(x)
    flat = y.reshape(2, -1)
    return flat, y.relu_()


def _data(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    y.data.mul_(2)
    return y


def _parts_of_an_expansion(m: Lambda, x: Tensor) -> Tensor:
    first, second = m.a(x).unsqueeze(1).expand(-1, 2, -1, -1, -1).flatten(3).unbind(1)
    first.add_(1)
    return first + 2 * second


def _parts_of_the_input(m: Lambda, x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)  # one and the same, where a caller expands one channel
    first.mul_(2)
    return m.a(torch.cat([first, second], 1))


def _slice_layer(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    part = m.part(y)
    part.relu_()
    return torch.cat([y, part], 1)


@pytest.mark.parametrize(
    ("forward", "name", "reader"),
    [
        (_partial, "add_", "output"),
        (_partial_operator, "iadd", "a_1"),
        (_view_read_later, "relu_", "output"),
        (_unknown_read_later, "relu_", "add"),
        (_whole_split_read_later, "relu_", "mul"),
        (_view_in_the_output, "relu_", "output"),
        (_data, "mul_", "output"),
        (_slice_layer, "relu_", "cat"),
        (_parts_of_an_expansion, "add_", "mul"),
        (_parts_of_the_input, "mul_", "cat"),
    ],
)
def test_writes_seen_through_a_view_are_refused(forward: Any, name: str, reader: str) -> None:
    with pytest.raises(NormalFormError) as caught:
        normal_form(Lambda(forward, a=conv(), part=ChannelSlice(0, 2)).eval())
    message = str(caught.value)
    first = forward.__code__.co_firstlineno
    line = int(message.split("test_aliasing_refusals.py:")[1].split(",")[0].split(")")[0])
    assert first < line < first + 6, "the line of the write"
    assert f"({name} at " in message and f"which {reader}" in message
    assert "write the out-of-place form" in message


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x + m.weight.mul_(2),
        lambda m, x: x + F.relu(m.weight, inplace=True),
        lambda m, x: x + m.weight.view(1, 4, 1, 1).add_(1),
        lambda m, x: x + operator.iadd(m.weight, 1),
        lambda m, x: x + m.act(m.weight),
    ],
    ids=["method", "flag", "view", "operator", "layer"],
)
def test_writes_into_parameters_are_refused(forward: Any) -> None:
    weight = torch.rand(4, 1, 1)
    model = Lambda(forward, weight=weight, act=nn.ReLU(inplace=True)).eval()
    with pytest.raises(NormalFormError, match=r"writes into weight, which would change the model on every call"):
        normal_form(model)
    assert torch.equal(model.weight, weight)


def _into_zeros(m: Lambda, x: Tensor) -> Tensor:
    y = torch.zeros(2, 4, 7, 5)
    y += x
    return y


def _item_of_zeros(m: Lambda, x: Tensor) -> Tensor:
    y = torch.zeros(2, 4, 7, 5)
    y[:, 1:3] = x
    return y


@pytest.mark.parametrize("forward", [_into_zeros, _item_of_zeros])
def test_writes_into_constants_of_the_graph_are_refused(forward: Any) -> None:
    with pytest.raises(NormalFormError, match="writes into _tensor_constant0"):
        normal_form(Lambda(forward).eval())


@pytest.mark.parametrize("method", ["copy_", "fill_", "bernoulli_"])
def test_writes_without_an_out_of_place_form_are_refused(method: str) -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        return getattr(m.a(x), method)(0.5)

    with pytest.raises(
        NormalFormError, match=rf"{method} at .*test_aliasing_refusals.py:\d+\) has no out-of-place form"
    ):
        normal_form(Lambda(forward, a=conv()).eval())


def test_an_out_argument_is_refused() -> None:
    model = Lambda(lambda m, x: torch.add(x, 1, out=m.a(x)), a=conv()).eval()
    with pytest.raises(NormalFormError, match="writes into an argument: use its result instead, without out="):
        normal_form(model)


def test_an_overload_that_writes_is_refused() -> None:
    model = Lambda(lambda m, x: torch.ops.aten.relu_.default(m.a(x)), a=conv()).eval()
    with pytest.raises(NormalFormError, match="has no out-of-place form"):
        normal_form(model)


def _rounds(m: Lambda, x: Tensor) -> Tensor:
    y = m.a(x)
    y = y.relu().half()
    y += m.a(x)  # in place, half stays half
    return y


def test_writes_of_wider_numbers_are_refused() -> None:
    x = image().float()
    with pytest.raises(NormalFormError) as caught:
        normalise(trace(Lambda(_rounds, a=conv()).eval()), inputs=(x,))
    line = _rounds.__code__.co_firstlineno + 3
    assert f"test_aliasing_refusals.py:{line})" in str(caught.value)
    assert "writes torch.float32 into half, which is torch.float16: cast a_1 first" in str(caught.value)


@pytest.mark.parametrize(
    "write",
    [lambda y, m: y.add_(y > 0), lambda y, m: y.mul_(torch.arange(5)), lambda y, m: y.sub_(m.wide)],
    ids=["bool", "integers", "a constant"],
)
def test_writes_that_keep_the_type_are_exact(write: Callable[[Tensor, Lambda], Tensor]) -> None:
    wide = torch.tensor([0.5, 2.0, -3.0, 1.0], dtype=torch.float64).view(4, 1, 1)
    model = Lambda(lambda m, x: write(m.a(x), m), a=conv(), wide=wide).eval()
    x = image().float()
    gm = normalise(trace(model), inputs=(x,))
    assert gm(x).dtype == torch.float32 and torch.equal(gm(x), model(x))
