"""Problems: a region read as ops on parts of tensors computes what the network does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block import Block
from blocks_slices import SLICES
from blocks_sums import SUMS
from nets import cbn, conv
from oracle import relative_difference
from regions import Net, run_problem
from torch import nn

from rmfx.algebra.pointwise import CARRIED
from rmfx.errors import InexactError
from rmfx.layout.problem import Problem
from rmfx.layout.reading import part_of, spans
from rmfx.layout.simplify import absorb_diagonals, compose_paths
from rmfx.modules import ChannelClamp, MaskedActivation

C: dict[str, Any] = {"a": lambda: cbn(6, 6), "b": lambda: conv(6, 6)}


def whole(block: Block) -> Net:
    """The network of a block that is one region, from its input to its output."""
    return Net(block.build.__closure__[0].cell_contents, block.shape, **block.build.__closure__[1].cell_contents)  # type: ignore[index]


WHOLE = ("inception", "ghost", "one-shot", "shuffled", "overlapping slices", "slopes of parts", "across groups")
WHOLE += ("clamps of parts", "the same twice", "three ways", "deep", "dense", "max-pools in both")


@pytest.mark.parametrize("keep_norms", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_a_problem_is_its_region(name: str, keep_norms: bool) -> None:
    net = whole({**SLICES, **SUMS}[name])
    problem = net.problem(keep_norms=keep_norms)
    with torch.no_grad():
        for each in (problem, absorb_diagonals(problem), compose_paths(problem, set(range(99)))):
            assert relative_difference(joined(net), run_problem(each, net.x)) < 1e-13


def joined(net: Net) -> torch.Tensor:
    """The value of the join."""
    join = net.join
    for node in net.gm.graph.find_nodes(op="output"):
        node.args = (join,)
    net.gm.recompile()
    with torch.no_grad():
        return net.gm(net.x)


def shape(problem: Problem) -> tuple[list[int], list[tuple[str, int]], tuple[int, ...]]:
    """Channels of the parts of the fork; kind and channels of each op; the join."""
    return (
        [v.channels for v in problem.fork],
        [(op.kind, op.value.channels) for op in problem.ops],
        problem.join,
    )


def test_concats_and_slices_are_no_ops() -> None:
    net = Net(lambda m, x: (lambda y: torch.cat((y[:, :2].relu(), y, x), 1))(m.b(x)), b=C["b"])
    assert shape(net.problem()) == ([6], [("linear", 2), ("linear", 4), ("pointwise", 2)], (3, 1, 2, 0))


def test_a_cut_passes_through_what_acts_on_each_channel() -> None:
    net = Net(lambda m, x: m.c(m.n(m.a(x).relu())[:, 4:]) + x, n=lambda: nn.BatchNorm2d(6), c=lambda: conv(2, 6), **C)
    kinds = shape(net.problem())[1]
    assert kinds == [
        *[("linear", 4), ("linear", 2)] * 2,  # the convolution and its norm, cut
        *[("pointwise", 4), ("pointwise", 2)],
        *[("linear", 4), ("linear", 2)],
        *[("linear", 6), ("sum", 6)],
    ]
    kept = shape(absorb_diagonals(net.problem()))[1]
    assert kept.count(("pointwise", 4)) == 0, "what nothing reads is dropped"


def test_a_convolution_stops_a_cut() -> None:
    net = Net(lambda m, x: m.c(m.a(x)[:, 4:]).relu() + x, c=lambda: conv(2, 6), **C)
    assert shape(net.problem())[0] == [6]
    through = Net(lambda m, x: torch.cat((m.c(m.d(x)[:, 4:]).relu(), x), 1), c=lambda: conv(2, 6),
                  d=lambda: conv(6, 6, groups=6))  # fmt: skip
    assert shape(through.problem())[0] == [4, 2]


def test_units_are_operations_of_the_network() -> None:
    net = Net(lambda m, x: m.c(m.a(x).relu()[:, 4:]) + x, c=lambda: conv(2, 6), **C)
    units = [op.unit for op in net.problem().ops if op.kind == "pointwise"]
    assert len(units) == 2 and len(set(units)) == 1


FAILS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a concat of rows": (
        lambda m, x: torch.cat((m.a(x).relu(), x), 2),
        C,
        "cat concatenates along another dimension than the channels",
    ),
    "a stage of features": (
        lambda m, x: m.p(m.a(x)) + m.p(x),
        {"a": lambda: nn.Linear(6, 6), "p": lambda: nn.MaxPool1d(3, 1, 1)},
        "p pools the features of a linear layer, which are no positions",
    ),
}


@pytest.mark.parametrize("name", FAILS)
def test_fails(name: str) -> None:
    forward, layers, reason = FAILS[name]
    net = Net(forward, (2, 6, 6) if "Linear" in str(layers["a"]()) else (2, 6, 7, 9), **layers)
    with pytest.raises(InexactError, match=reason):
        net.problem()


def test_unknown_channels() -> None:
    net = Net(lambda m, x: m.p(x.relu()) + x, sized=False, p=lambda: nn.AvgPool2d(3, 1, 1))
    with pytest.raises(InexactError, match="the number of channels at x is unknown: pass example_inputs"):
        net.problem()


def test_sums_that_broadcast_channels() -> None:
    net = Net(lambda m, x: m.c(x) + m.a(x).relu(), sized=False, c=lambda: conv(6, 1), **C)
    with pytest.raises(InexactError, match="the sum broadcasts 1 and 6 channels"):
        net.problem()


# -- parts of layers --------------------------------------------------------------------------------------------------

LAYERS: dict[str, nn.Module] = {
    "one for all": nn.GELU(),
    "one slope": nn.PReLU(1),
    "slopes": nn.PReLU(6),
    "clamps": ChannelClamp(torch.tensor([-6.0, -1, 0, 1, 2, 3]), torch.tensor([-2.0, 1, 9, 2, 8, 4])),
    "mask": MaskedActivation(nn.Tanh(), torch.tensor([True, False, True, True, False, False])),
    "norm": nn.BatchNorm2d(6),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_part_of_a_layer_acts_as_the_whole_does_on_these_channels(name: str) -> None:
    layer = LAYERS[name].double().eval()
    for tensor in layer.state_dict().values():
        if name in ("slopes", "norm") and tensor.is_floating_point():
            tensor.copy_(torch.rand(6) + 0.5)
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64) * 8
    with torch.no_grad():
        for start, length in ((0, 2), (2, 3), (5, 1), (0, 6)):
            part = part_of(layer, (start, length), 6)
            inside = slice(start, start + length)
            assert relative_difference(layer(x)[:, inside], part(x[:, inside])) < 1e-15
    assert part_of(layer, (0, 6), 6) is layer
    assert {id(t) for t in layer.state_dict(keep_vars=True).values()} == {id(t) for t in state(layer)}


def state(layer: nn.Module) -> list[torch.Tensor]:
    return [*layer.parameters(), *layer.buffers()]


def test_a_part_of_a_norm_knows_which_of_its_channels_are_carried() -> None:
    norm = nn.BatchNorm2d(6)
    norm.__dict__[CARRIED] = [0, 3, 4]
    part = part_of(norm, (2, 3), 6)
    assert part.__dict__[CARRIED] == [1, 2] and part.num_features == 3
    assert norm.__dict__[CARRIED] == [0, 3, 4] and norm.num_features == 6


def test_spans() -> None:
    assert spans((0, 2, 5)) == [(0, 2), (2, 3)]
