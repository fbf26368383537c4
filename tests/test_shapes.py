"""Shapes and types are those of a real run, and what cannot run is not taken for what can."""

from __future__ import annotations

import logging

import pytest
import torch
from nets import BNS, NETS, build
from torch import Tensor, fx, nn

import rmfx
from rmfx.errors import UnsupportedModelError
from rmfx.front.shapes import find_shapes, propagate

SIZES = {0: (4, 3), 1: (2, 3, 5), 2: (2, 3, 5, 4), 3: (2, 3, 5, 4, 3)}


class Run(fx.Interpreter):
    """Runs a network and compares what is known of every tensor with it."""

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        known = n.meta.get("shape"), n.meta.get("dtype")
        assert known == ((value.shape, value.dtype) if isinstance(value, Tensor) else (None, None)), n
        return value


def calling(layer: nn.Module) -> fx.GraphModule:
    """A graph of one call."""
    graph = fx.Graph()
    graph.output(graph.call_module("layer", (graph.placeholder("x"),)))
    return fx.GraphModule({"layer": layer}, graph)


def compared(gm: fx.GraphModule, x: Tensor) -> None:
    propagate(gm, (x,))
    with torch.no_grad():
        Run(gm).run(x)


@pytest.mark.parametrize("name", NETS)
def test_every_network_as_it_runs(name: str) -> None:
    model, x = build(name)
    compared(fx.symbolic_trace(model), x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dims", SIZES)
@pytest.mark.parametrize("statistics", [False, True])
def test_norms(dims: int, training: bool, statistics: bool) -> None:
    norm = BNS[dims](3, track_running_stats=statistics)
    compared(calling(norm.train(training)), torch.randn(SIZES[dims]))


class Doubling(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x)] * 2, 1)


def test_norms_that_do_more_than_that_are_run() -> None:
    compared(calling(Doubling(3).eval()), torch.randn(SIZES[2]))
    hooked = nn.BatchNorm2d(3).eval()
    hooked.register_forward_hook(lambda module, args, result: result[:1])
    compared(calling(hooked), torch.randn(SIZES[2]))
    compared(calling(nn.BatchNorm2d(3).eval()), torch.randn(SIZES[2]).bfloat16())


@pytest.mark.parametrize(
    ("norm", "x"),
    [
        (nn.BatchNorm2d(3), torch.zeros(2, 4, 5, 5)),
        (nn.BatchNorm2d(3), torch.zeros(2, 3, 5)),
        (nn.BatchNorm1d(3), torch.zeros(2, 3, 5, 5)),
    ],
)
def test_norms_that_cannot_run_raise(norm: nn.Module, x: Tensor) -> None:
    gm = calling(norm.eval())
    with pytest.raises((ValueError, RuntimeError)):
        gm(x)
    with pytest.raises((ValueError, RuntimeError)):
        propagate(gm, (x,))
    assert not find_shapes(gm, (x,)) and not any({"shape", "val"} & node.meta.keys() for node in gm.graph.nodes)


def test_what_cannot_run_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(5, 3)).eval()
    with pytest.raises(UnsupportedModelError, match="cannot be run on the example inputs"):
        rmfx.convert(model, torch.zeros(2, 3))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not logging.getLogger("torch._subclasses.fake_tensor").disabled
