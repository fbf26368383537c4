"""Sizes that are read inside a region: of which tensor they are read when it is gone, and when they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block import net
from front import hostile
from nets import cbn, conv
from oracle import assert_equivalent
from torch import Tensor, fx, nn

import rmfx
from rmfx.hostile import randomise
from rmfx.layout.sizes import put_in_order

STRIDED: dict[str, Any] = {"a": lambda: cbn(6, 4, 3, 2), "b": lambda: cbn(4, 4), "c": lambda: cbn(6, 4, 1, 2)}


def converted(forward: Any, sized: bool, shape: tuple[int, ...] = (2, 6, 8, 9), **layers: Any) -> Any:
    """The converted network, equal at two sizes; the reason of its first sum."""
    x = hostile(*shape)
    model = randomise(net(forward, **layers)().double(), x / 8)
    result = rmfx.convert(model, x if sized else None, verify=False)
    result.graph.lint()
    assert_equivalent(model, result, x)
    assert_equivalent(model, result, hostile(3, 6, *(size + 1 for size in shape[2:])))
    return result, rmfx.report(result).entries[0].reason


def _rows(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return (m.b(y) + m.c(x)) * y.shape[2]


def _before_the_join(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    part = x[:, :4, : y.size(2), : y.shape[-1]]
    return (m.b(y) + m.c(x)) * part.mean((1, 2, 3), keepdim=True)


def _batch(m: Any, x: Tensor) -> Tensor:
    y = m.d(m.a(x)).relu()
    return (m.b(y) + m.c(x)).reshape(y.shape[0], -1) * y.size(0)


def _rest(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return torch.nn.functional.interpolate(m.b(y) + m.c(x), size=x.shape[2:]) * y.shape[-2:][0]


def _behind_a_pool(m: Any, x: Tensor) -> Tensor:
    y = m.p(m.e(x))
    return (m.b(y).relu() + m.p(m.f(x))) * y.shape[3]


MORE: dict[str, Any] = {
    "d": lambda: conv(4, 4), "e": lambda: cbn(6, 4), "f": lambda: cbn(6, 4, 1), "p": lambda: nn.MaxPool2d(3, 2, 1),
}  # fmt: skip


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("forward", [_rows, _before_the_join, _batch, _rest, _behind_a_pool])
def test_sizes_are_read_of_what_has_them(forward: Any, sized: bool) -> None:
    _, reason = converted(forward, sized, **STRIDED, **MORE)
    assert reason is None


def test_sizes_of_the_fork_and_the_join_are_read_there() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        z = m.b(m.a(x).relu()) + m.c(x)
        return z + torch.full(z.shape, x.shape[3] / 8, dtype=z.dtype)

    assert converted(forward, True, **STRIDED)[1] is None


REFUSED = {
    "all sizes": (lambda m, x, y: torch.ones(y.shape).sum(), "getattr_1 reads the number of channels of relu"),
    "as many elements": (lambda m, x, y: y.numel(), "numel reads the number of channels of relu, which goes"),
    "channels from the end": (lambda m, x, y: y.shape[-3:][2], "reads the number of channels of relu, which goes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_channels_are_not_handed_over(name: str) -> None:
    read, reason = REFUSED[name]

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        return (m.b(y) + m.c(x)) * read(m, x, y)

    assert reason in (converted(forward, True, **STRIDED)[1] or "")


def test_a_size_that_equals_another_at_the_example_only() -> None:
    # At size 8 both give 4 rows, at size 9 they give 4 and 5: the plain network composes the first away.
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        return (m.b(y) + m.c(x).relu()) * y.shape[2]

    x = hostile(2, 6, 1, 1)
    model = randomise(net(forward, a=lambda: conv(6, 4, 1, 2), b=lambda: conv(4, 4, 1), c=lambda: conv(6, 4, 1, 2))()
                      .double(), x / 8)  # fmt: skip
    result = rmfx.convert(model, x, verify=False)
    for size in (1, 5, 8):
        assert_equivalent(model, result, hostile(9, 6, size, size))


def test_a_gate_computed_with_sizes() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x).relu()
        gate = m.b(y.mean((2, 3), keepdim=True) * y.shape[2] / y.size(3)).sigmoid()
        return m.d(y * gate) + m.c(x)

    assert converted(forward, True, **STRIDED, d=MORE["d"])[1] is None


def test_order() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_method("sin", (x,))
    second = graph.call_method("cos", (first,))
    third = graph.call_method("exp", (x,))
    graph.output(second)
    first.args = (third,)
    put_in_order(graph)
    assert [node.name for node in graph.nodes] == ["x", "exp", "sin", "cos", "output"]
    graph.lint()
