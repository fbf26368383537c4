"""The checker of the normal form: every rule can fail."""

from __future__ import annotations

import operator
import time
from typing import Any

import pytest
import torch
from front import Lambda, assert_exact, conv, image, normal_form, operations
from torch import Tensor, fx, nn
from torch.nn import functional as F

from rmfx.errors import NormalFormError
from rmfx.front.normal import check_normal
from rmfx.front.trace import trace
from rmfx.passes.normalise import normalise


def plain() -> fx.GraphModule:
    gm = normal_form(
        Lambda(lambda m, x: F.relu(m.a(x)) + m.b(x) + m.t, a=conv(), b=conv(), t=torch.rand(4, 7, 5)).eval()
    )
    assert operations(gm) == ["Conv2d", "ReLU", "Conv2d", "add", "add"]
    return gm


def _train(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    gm.a.train()


def _hook(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    gm.a.register_forward_pre_hook(lambda *args: None)


def _parametrize(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    nn.utils.parametrize.register_parametrization(gm.a, "weight", nn.Tanh().eval())
    gm.a.eval()


def _call_twice(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    nodes["b"].target = "a"


def _share(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    gm.b = gm.a


def _identity(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    gm.relu = nn.Identity().eval()


def _dropout(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    nodes["relu"].op, nodes["relu"].target, nodes["relu"].kwargs = "call_function", F.dropout, {"training": False}
    del gm.relu


def _add_number(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    nodes["add"].args = (nodes["relu"], 2)
    nodes["add_1"].args = (nodes["add"], nodes["b"])
    gm.graph.erase_node(nodes["t"])
    del gm.t


def _add_keyword(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    nodes["add"].kwargs = {"alpha": 2}


def _in_place_layer(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    gm.relu.inplace = True


def _in_place_operator(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    nodes["add"].target = operator.iadd


def _in_place_method(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    nodes["add"].op, nodes["add"].target = "call_method", "add_"


def _in_place_flag(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    nodes["relu"].op, nodes["relu"].target, nodes["relu"].kwargs = "call_function", F.relu, {"inplace": True}
    del gm.relu


def _out(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    nodes["add"].target, nodes["add"].kwargs = torch.add, {"out": nodes["b"]}


def _dead(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    with gm.graph.inserting_before(nodes["add"]):
        gm.graph.call_function(torch.tanh, (nodes["relu"],))


def _disorder(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    nodes["a"].args = (nodes["add"],)


def _no_output(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    gm.graph.erase_node(nodes["output"])


def _dangling(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    nodes["t"].target = "nowhere"


def _unused_layer(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    gm.add_submodule("box.extra", nn.ReLU().eval())


def _unused_weights(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    gm.add_submodule("box.extra", conv().eval())


def _unused_tensor(gm: fx.GraphModule, nodes: dict[str, fx.Node]) -> None:
    gm.register_buffer("extra", torch.rand(3))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_train, "rule 1 .*: a .*calls a, which is in training mode"),
        (_hook, "rule 1 .*: a .*calls a, which has a forward hook"),
        (_parametrize, "rule 1 .*: a .*calls a, which is parametrized"),
        (_call_twice, "rule 2 .*: b .*calls the layer a, which a calls already"),
        (_share, "rule 2 .*: b .*calls the layer b, which a calls already"),
        (_identity, "rule 2 .*: relu .*a Identity that does nothing"),
        (_dropout, "rule 2 .*: relu .*is a dropout that does nothing"),
        (_add_number, "rule 3 .*: add .*not of exactly two tensors"),
        (_add_keyword, "rule 3 .*: add .*not of exactly two tensors"),
        (_in_place_layer, "rule 4 .*: relu .*which works in place"),
        (_in_place_operator, "rule 4 .*: add .*works in place: iadd"),
        (_in_place_method, "rule 4 .*: add .*works in place: add_"),
        (_in_place_flag, "rule 4 .*: relu .*works in place: relu"),
        (_out, "rule 4 .*: add .*works in place: add"),
        (_dead, "rule 5 .*: tanh .*is dead"),
        (_disorder, "rule 5 .*: the graph is not well-formed: .*before it has been"),
        (_no_output, "rule 5 .*: the graph has no output"),
        (_dangling, "rule 5 .*: the graph is not well-formed: .*nonexistent attribute"),
        (_unused_layer, "rule 5 .*: nothing calls the layer box.extra"),
        (_unused_weights, "rule 5 .*: nothing reads the tensor box.extra.weight"),
        (_unused_tensor, "rule 5 .*: nothing reads the tensor extra"),
    ],
)
def test_every_rule_of_the_normal_form_can_be_broken(spoil: Any, message: str) -> None:
    gm = plain()
    check_normal(gm)
    spoil(gm, {node.name: node for node in gm.graph.nodes})
    with pytest.raises(NormalFormError, match=message):
        check_normal(gm)


def test_sizes_may_be_added_up() -> None:
    gm = assert_exact(Lambda(lambda m, x: x.view(2, x.size(1) + 0, -1, x.shape[-1])), image())
    assert operations(gm) == ["size", "add", "getattr", "getitem", "reshape"]


class Deep(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)) for _ in range(depth))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block(x)
            y += x
            x = self.relu(y)
        return x


def _seconds(depth: int) -> tuple[float, float]:
    model = Deep(depth).eval()
    gm = trace(model)
    start = time.perf_counter()
    normalise(gm)
    middle = time.perf_counter()
    check_normal(gm)
    return middle - start, time.perf_counter() - middle


def test_the_work_is_linear_in_the_number_of_nodes() -> None:
    """Eight times the nodes: a quadratic step would take 64 times as long. The best of three, for busy machines."""
    short = [min(times) for times in zip(*(_seconds(50) for _ in range(3)), strict=True)]
    long = [min(times) for times in zip(*(_seconds(400) for _ in range(3)), strict=True)]
    for before, after in zip(short, long, strict=True):
        assert after < 24 * before
