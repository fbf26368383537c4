"""Inputs and outputs of any form pass through a conversion, and so do sums that stay."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from front import Lambda, hostile, operations
from nets import conv
from oracle import outputs, relative_difference
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import rmfx
from rmfx.hostile import randomise


class Detector(nn.Module):
    """Two inputs, one by keyword with a default, and a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(4, 4, bias=True), conv(4, 4), conv(4, 2, 1)

    def forward(
        self, image: Tensor, prior: Tensor, *, scale: Tensor | None = None, flag: bool = True
    ) -> dict[str, Any]:
        y = image + self.b(torch.relu(self.a(image)))
        return {"boxes": (self.c(y), [y, prior - y]), "scores": y.mean((2, 3)), "nothing": None, "flag": flag}


def detector() -> tuple[nn.Module, Tensor, Tensor]:
    image, prior = hostile(2, 4, 7, 8), hostile(2, 4, 7, 8, seed=1)
    return randomise(Detector().double(), (image / 8, prior / 8)), image, prior


def test_several_inputs_and_nested_outputs() -> None:
    model, image, prior = detector()
    converted = rmfx.convert(model, (image, prior))
    assert rmfx.report(converted).count("removed") == 1
    image, prior = hostile(3, 4, 9, 6), hostile(3, 4, 9, 6, seed=1)
    with torch.no_grad():
        want, got = model(image, prior), converted(image, prior)
    want_leaves, want_form = pytree.tree_flatten(want)
    got_leaves, got_form = pytree.tree_flatten(got)
    assert got_form == want_form and len(want_leaves) == 6
    for expected, actual in zip(want_leaves, got_leaves, strict=True):
        if isinstance(expected, Tensor):
            assert relative_difference(expected, actual) < 1e-13
        else:
            assert actual is expected


def test_keyword_inputs() -> None:
    model, image, prior = detector()
    by_name = rmfx.convert(model, image, example_kwargs={"prior": prior})
    by_place = rmfx.convert(model, (image, prior))
    assert by_name.code == by_place.code
    with torch.no_grad():
        assert torch.equal(by_name(image, prior=prior)["scores"], by_place(prior=prior, image=image)["scores"])
    only_names = rmfx.convert(model, example_kwargs={"image": image, "prior": prior})
    assert rmfx.report(only_names).totals.macs_before == rmfx.report(by_name).totals.macs_before


def test_integer_inputs() -> None:
    embed = nn.Embedding(10, 6)
    first, second = nn.Linear(6, 8), nn.Linear(8, 6)
    model = Lambda(lambda m, i: (lambda y: y + m.b(m.a(y).relu()))(m.e(i)), e=embed, a=first, b=second).double().eval()
    indices = torch.randint(0, 10, (3, 5))
    converted = rmfx.convert(model, indices)
    assert rmfx.report(converted).count("removed") == 1
    assert relative_difference(outputs(model, indices)[0], outputs(converted, indices)[0]) < 1e-13


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_batch_is_free(batch: int) -> None:
    model, image, prior = detector()
    converted = rmfx.convert(model, (image, prior))
    x = hostile(batch, 4, 7, 8)
    with torch.no_grad():
        assert relative_difference(model(x, x)["boxes"][0], converted(x, x)["boxes"][0]) < 1e-13


STAYING = {
    "a difference": (lambda m, x: x - m.pool(m.a(x)), ["Conv2d", "MaxPool2d", "sub"]),
    "a sum": (lambda m, x: m.pool(m.a(x)) + x, ["Conv2d", "MaxPool2d", "add"]),
    "an augmented sum": (lambda m, x: operator.iadd(m.pool(m.a(x)), x), ["Conv2d", "MaxPool2d", "add"]),
    "torch.sub": (lambda m, x: torch.sub(x, m.pool(m.a(x))), ["Conv2d", "MaxPool2d", "sub"]),
}


@pytest.mark.parametrize("name", STAYING)
def test_a_sum_that_stays_stays_as_it_was(name: str) -> None:
    forward, expected = STAYING[name]
    x = hostile(2, 4, 8, 8)
    model = randomise(Lambda(forward, a=conv(4, 4), pool=nn.MaxPool2d(3, 1, 1)).double(), x / 8)
    converted = rmfx.convert(model, x)
    assert sorted(operations(converted)) == sorted(expected)
    (node,) = (n for n in converted.graph.nodes if n.op == "call_function")
    assert node.target in (operator.add, operator.sub) and len(node.args) == 2
    assert torch.equal(converted(x), model(x))
    assert rmfx.report(converted).count("refused") == 1


def test_a_difference_that_stays_keeps_its_sign_apart() -> None:
    model = Lambda(lambda m, x: m.pool(x) - m.a(x), a=conv(4, 4), pool=nn.MaxPool2d(3, 1, 1)).double().eval()
    assert operations(rmfx.convert(model)) == ["MaxPool2d", "Conv2d", "sub"]


def test_the_forward_takes_the_arguments_of_the_model() -> None:
    """But those that are ``None`` where they are not given: code decides by them."""
    model, image, prior = detector()
    placeholders = [n for n in rmfx.convert(model).graph.nodes if n.op == "placeholder"]
    assert [(n.target, n.args) for n in placeholders] == [("image", ()), ("prior", ()), ("flag", (True,))]
    assert isinstance(rmfx.convert(model), fx.GraphModule)
