"""Arguments that have NumPy's names, as torch takes them, are read like torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from front import Lambda, assert_exact, conv, hostile, image, operations
from torch import Tensor, fx, nn

import rmfx
from rmfx.front.keywords import spell_keywords

# Called with NumPy's names, and what that is in normal form; numbers that follow from sizes would be wrong.
CALLS: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "cat": (lambda y: (z := torch.cat([y, y[:, :2]], axis=1)) * z.shape[1], ["ChannelSlice", "cat", "ChannelAffine"]),
    "stack": (lambda y: torch.stack([y, y.abs()], axis=1).sum(0), ["Elementwise", "stack", "sum"]),
    "sum of a stack": (lambda y: torch.stack([y, y.abs()], axis=1).sum(axis=1), ["Elementwise", "add"]),
    "a kept axis": (lambda y: torch.stack([y, y.abs()]).sum(axis=0, keepdims=True), ["Elementwise", "stack", "sum"]),
    "chunk": (lambda y: y.chunk(2, axis=1)[1].relu(), ["ChannelSlice", "ReLU"]),
    "narrow": (lambda y: torch.narrow(y, axis=1, start=1, length=2), ["ChannelSlice"]),
    "mean": (lambda y: y.mean(axis=(2, 3), keepdims=True), ["AdaptiveAvgPool2d"]),
    "unsqueeze": (lambda y: (z := y.unsqueeze(axis=1)) * z.shape[2], ["unsqueeze", "ChannelAffine"]),
    "a size": (lambda y: y * y.size(axis=1), ["ChannelAffine"]),
    "add": (lambda y: torch.add(x1=y, x2=y.abs()), ["Elementwise", "add"]),
    "sub": (lambda y: y.sub(x2=y.abs()), ["Elementwise", "ChannelAffine", "add"]),
    "mul": (lambda y: torch.mul(a=y, x2=y.abs()), ["Elementwise", "mul"]),
    "a layer": (lambda y: torch.sigmoid(x=y), ["Sigmoid"]),
    "in place": (lambda y: torch.relu_(x=y) + y, ["ReLU", "add"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    function, expected = CALLS[name]
    gm = assert_exact(Lambda(lambda m, x: function(m.conv(x)), conv=conv()), image())
    assert operations(gm) == ["Conv2d", *expected]


def test_a_global_pool_of_a_converted_network() -> None:
    model = Lambda(lambda m, x: m.conv(x).mean(axis=(2, 3), keepdims=True) + x, conv=nn.Conv2d(4, 4, 1)).double().eval()
    x = hostile(2, 4, 6, 6)
    assert torch.allclose(rmfx.convert(model, x)(x), model(x), rtol=0, atol=1e-12)


def test_names_that_are_the_operators_own_stay() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for function, kwargs in OWN:
        graph.call_function(function, (), dict.fromkeys(kwargs, x))
    spell_keywords(fx.GraphModule({}, graph))
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert [(node.target, tuple(node.kwargs)) for node in calls] == OWN


def sum_of(x: Tensor, axis: int) -> Tensor:
    """A function of the user, whose names mean what it says."""
    return x.sum(axis)


OWN: list[tuple[Callable[..., Any], tuple[str, ...]]] = [
    (torch.cosine_similarity, ("x1", "x2", "dim")),
    (torch.trapezoid, ("y", "x")),
    (torch.tensordot, ("a", "b", "dims")),  # written in Python
    (sum_of, ("x", "axis")),
]
