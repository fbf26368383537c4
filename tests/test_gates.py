"""Which operand of a product is the gate, and what it is computed from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block import SqueezeExcite
from blocks_gates import EfficientChannelAttention
from nets import cbn, conv
from regions import Net
from torch import Tensor, fx, nn

from rmfx.graph import gates
from rmfx.graph.facts import is_product
from rmfx.graph.gates import GatePath, read_gate

C: dict[str, Any] = {"a": lambda: cbn(6, 6), "b": lambda: conv(6, 6), "pool": lambda: nn.AdaptiveAvgPool2d(1)}


def product(net: Net) -> fx.Node:
    """The last product."""
    return [node for node in net.gm.graph.nodes if is_product(node)][-1]


def gate(net: Net) -> GatePath:
    """The gate of the last product."""
    found = read_gate(product(net))
    assert isinstance(found, GatePath), found
    return found


def described(path: GatePath) -> tuple[str, str, list[str], list[str]]:
    """Names of data, factor, what is beside, what that reads."""
    return path.data.name, path.factor.name, [n.name for n in path.side], [n.name for n in path.reads]


def _factor(m: Any, y: Tensor) -> Tensor:
    return m.b(m.pool(y)).sigmoid()


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda m, x: (lambda y: y * _factor(m, y))(m.a(x)), ("a_1", "sigmoid", ["pool", "b", "sigmoid"], ["a_1"])),
        (lambda m, x: (lambda y: _factor(m, y) * y)(m.a(x)), ("a_1", "sigmoid", ["pool", "b", "sigmoid"], ["a_1"])),
        (lambda m, x: m.a(x) * _factor(m, x), ("a_1", "sigmoid", ["pool", "b", "sigmoid"], ["x"])),
        (lambda m, x: m.b(x).sigmoid() * m.a(x).relu(), ("relu", "sigmoid", ["b", "sigmoid"], ["x"])),
        (lambda m, x: m.a(x) * x, ("x", "a_1", ["a_0", "a_1"], ["x"])),
        (lambda m, x: x * m.a(x), ("x", "a_1", ["a_0", "a_1"], ["x"])),
    ],
    ids=[
        "behind",
        "before",
        "of the fork",
        "the smaller side",
        "computed from the data",
        "computed from the data, second",
    ],
)
def test_operands(forward: Any, expected: tuple[str, str, list[str], list[str]]) -> None:
    layers = {name: make for name, make in C.items() if name in ("a", "b", "pool")}
    assert described(gate(Net(forward, **layers))) == expected


def test_what_broadcasts_is_the_gate_even_where_it_is_the_longer_computation() -> None:
    net = Net(lambda m, x: m.mask(m.b(m.a(x)).relu()).sigmoid() * x.tanh(), mask=lambda: conv(6, 1), **C)
    assert (gate(net).data.name, gate(net).factor.name) == ("tanh", "sigmoid")
    assert [node.name for node in gate(net).side] == ["a_0", "a_1", "b", "relu", "mask", "sigmoid"]


def test_a_shared_part_is_a_read() -> None:
    net = Net(lambda m, x: (lambda p: (m.a(x) * m.b(p).sigmoid(), p))(m.pool(x)), **C)
    assert described(gate(net)) == ("a_1", "sigmoid", ["b", "sigmoid"], ["pool"])


def test_a_factor_that_is_read_twice_is_a_read_itself() -> None:
    net = Net(lambda m, x: (lambda g: m.a(x) * g + m.b(x) * g)(m.c(x).sigmoid()), c=lambda: conv(6, 1), **C)
    assert described(gate(net)) == ("b", "sigmoid", [], ["sigmoid"])


def test_several_reads_constants_and_sizes() -> None:
    net = Net(
        lambda m, x: (lambda y: y * (m.b(m.pool(y)) + m.pool(x) + m.p).reshape(y.shape[0], 6, 1, 1).sigmoid())(m.a(x)),
        p=lambda: nn.Parameter(torch.randn(6, 1, 1)), **C,
    )  # fmt: skip
    path = gate(net)
    assert [node.name for node in path.reads] == ["x", "a_1"] and path.data.name == "a_1"
    assert not any(node.op == "get_attr" for node in path.side)


def test_a_module_is_read_like_inline_code() -> None:
    for layer in (SqueezeExcite(6), EfficientChannelAttention()):
        path = gate(Net(lambda m, x: m.se(m.a(x)), se=lambda layer=layer: layer, **C))
        assert path.data.name == "a_1" and path.factor.name.endswith(("sigmoid", "gate"))
        assert [node.name for node in path.reads] == ["a_1"] and len(path.side) >= 5


def test_no_gate() -> None:
    square = Net(lambda m, x: m.a(x * x), **C)
    mixed = Net(lambda m, x: (lambda y: y * y)(x.to(torch.int64)), **C)  # a square of floats is an activation
    assert read_gate(product(mixed)) == "the product is not one of two different tensors"
    assert read_gate(square.nodes["a_0"]) == "the product is not one of two different tensors"


def test_sides_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(lambda m, x: (lambda y: y * _factor(m, y))(m.a(x)), **C)
    monkeypatch.setattr(gates, "MOST_NODES", 2)
    assert described(gate(net)) == ("a_1", "sigmoid", ["b", "sigmoid"], ["pool"])
