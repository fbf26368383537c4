"""Gates over a stack: exactly 1 on what is carried, in every float type; reads picked where that is exact."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from block import SqueezeExcite
from blocks import BLOCKS
from front import hostile, operations
from nets import cbn, conv
from regions import Net
from torch import Tensor, fx, nn

import rmfx
from rmfx.graph.gates import GatePath
from rmfx.hostile import randomise
from rmfx.layout.gating import argument_of_one, spread_factor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.Hardsigmoid()], ids=["sigmoid", "hard sigmoid"])
def test_one_is_exact(gate: nn.Module, dtype: torch.dtype) -> None:
    argument = argument_of_one(gate)
    assert argument is not None
    assert (gate(torch.full((9,), argument, dtype=dtype)) == 1).all()


def test_where_no_one_is_known() -> None:
    assert argument_of_one(nn.Tanh()) is None and argument_of_one(None) is None


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_the_factor_of_each_channel(dims: int) -> None:
    weight, bias = spread_factor([2, -1, 0], 3, dims, 40.0).weights()
    assert weight.shape == (3, 3, *[1] * dims) and bias is not None
    assert weight.flatten(1).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]] and bias.tolist() == [0, 40, 0]


class Values(fx.Interpreter):
    """Keeps every value of a run."""

    def __init__(self, gm: fx.GraphModule, x: Tensor) -> None:
        super().__init__(gm)
        self.values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            self.run(x)

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


@pytest.mark.parametrize("name", ["se after the middle", "spatial", "full", "a tensor of the region", "tokens", "1d"])
def test_what_is_carried_is_multiplied_by_exactly_one(name: str) -> None:
    block = BLOCKS[f"gate: {name}"]
    x = hostile(*block.shape)
    model = randomise(block.build().double(), x / 8)
    converted = rmfx.convert(model, x, verify=False)
    products = [node for node in converted.graph.nodes if node.target is operator.mul]
    values = Values(converted, x).values
    axis = -1 if "tokens" in name else 1
    for product in products:
        stack, factor = (values[node] for node in product.args)
        ones = (factor == 1).transpose(0, axis).flatten(1).all(1)
        assert stack.shape[axis] == factor.shape[axis] and 0 < ones.sum() < len(ones)


def _pooled(net: fx.GraphModule, pool: type[nn.Module]) -> list[str]:
    """What stands in front of each pool of this type."""
    nodes = [n for n in net.graph.nodes if n.op == "call_module" and type(net.get_submodule(str(n.target))) is pool]
    return [type(net.get_submodule(str(node.all_input_nodes[0].target))).__name__ for node in nodes]


@pytest.mark.parametrize(
    ("pool", "carrier", "before"),
    [
        (nn.AdaptiveAvgPool2d, "auto", "PReLU"),  # the pool reads the stack, what it gives is picked
        (nn.AdaptiveMaxPool2d, "auto", "PReLU"),
        (nn.AdaptiveAvgPool2d, "split", "ReLU"),  # the mean of a difference is the difference of the means
        (nn.AdaptiveMaxPool2d, "split", "Conv2d"),  # but not so the maximum
    ],
)
def test_pools_go_before_the_picking_where_that_is_exact(pool: Any, carrier: str, before: str) -> None:
    block = BLOCKS["gate: a maximum of the fork"]
    model = block.build()
    model.top = pool(1)
    x = hostile(*block.shape)
    randomise(model.double(), x / 8)
    converted = rmfx.convert(model, x, carrier=carrier)
    assert _pooled(converted, pool) == [before]


def test_a_gate_that_can_be_one_is_spread_before_its_activation() -> None:
    for gate, expected in ((nn.Sigmoid(), ["Conv2d", "Sigmoid", "mul"]), (nn.Tanh(), ["Tanh", "Conv2d", "mul"])):
        x = hostile(2, 6, 7, 9)
        model = Net(lambda m, x: x + m.b(m.se(m.a(x))), a=lambda: cbn(6, 4), b=lambda: conv(4, 6),
                    se=lambda gate=gate: SqueezeExcite(4, gate)).model  # fmt: skip
        layers = operations(rmfx.convert(model, x, verify=False))
        assert layers[layers.index("mul") - 2 : layers.index("mul") + 1] == expected


def test_the_gate_of_a_region() -> None:
    net = Net(lambda m, x: x + m.se(m.a(x)), a=lambda: cbn(6, 6), se=lambda: SqueezeExcite(6))
    (gate,) = net.region.gates
    assert isinstance(gate, GatePath)
    (op,) = [op for op in net.problem().ops if op.kind == "gate"]
    assert op.gate is not None and (op.gate.key, op.gate.channels, op.gate.start) == (gate.node, 6, 0)
