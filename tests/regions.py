"""What the tests of regions and layouts share: a small network as nodes by name, its region, its problem."""

from __future__ import annotations

from typing import Any

import torch
from block import net
from front import hostile, normal_form
from test_affine import run_affine
from torch import Tensor, fx, nn

from rmfx.graph.facts import annotate, is_sum
from rmfx.graph.region import Region, find_region, is_concat
from rmfx.graph.rule import Refusal
from rmfx.hostile import randomise
from rmfx.layout.problem import Problem
from rmfx.layout.reading import read_region

IMAGE = (2, 6, 7, 9)


class Net:
    """A network in normal form with its facts; ``forward`` and ``layers`` as for :func:`block.net`."""

    def __init__(self, forward: Any, shape: tuple[int, ...] = IMAGE, sized: bool = True, **layers: Any) -> None:
        torch.manual_seed(0)
        self.x = hostile(*shape)
        self.model: nn.Module = randomise(net(forward, **layers)().double(), self.x / 8)
        self.gm: fx.GraphModule = normal_form(self.model)
        annotate(self.gm, (self.x,) if sized else None)
        self.nodes: dict[str, fx.Node] = {node.name: node for node in self.gm.graph.nodes}

    @property
    def join(self) -> fx.Node:
        """The last sum or concat."""
        return [node for node in self.gm.graph.nodes if is_sum(node) or is_concat(node)][-1]

    def found(self) -> Region | Refusal:
        """Its region, or the refusal."""
        return find_region(self.join)

    @property
    def region(self) -> Region:
        """Its region."""
        region = self.found()
        assert isinstance(region, Region), region
        return region

    @property
    def reason(self) -> str:
        """Why there is no region."""
        refusal = self.found()
        assert isinstance(refusal, Refusal), refusal
        return refusal.reason

    def problem(self, **options: Any) -> Problem:
        """What its region asks for."""
        dims = self.region.dims
        assert dims is not None
        return read_region(self.region, dims, 1 if dims else -1, **options)


def run_problem(problem: Problem, fork: Tensor) -> Tensor:
    """The join, computed op by op: what a problem means, without gates."""
    axis = 1 if problem.dims else -1
    values = list(fork.split([value.channels for value in problem.fork], axis))
    with torch.no_grad():
        for op in problem.ops:
            inputs = [values[number] for number in op.inputs]
            if op.kind in ("linear", "sum"):
                terms = [run_affine(affine, value) for affine, value in zip(op.maps, inputs, strict=True)]
                values.append(sum(terms[1:], terms[0]))
            else:
                assert op.layer is not None and op.gate is None
                values.append(op.layer(inputs[0]))
            assert values[-1].shape[axis] == op.value.channels
            assert op.value.range[0] <= values[-1].min() and values[-1].max() <= op.value.range[1]
    return torch.cat([values[number] for number in problem.join], axis)
