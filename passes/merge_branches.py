"""Parallel linear branches that are summed become one convolution (re-parameterisation).

        +-- L1 --+
    x --+        +--> y        becomes        x -> conv(L1 + L2) -> y
        +-- L2 --+

where each branch is any chain of convolutions, norms, scales and average pools, or the identity:
``(L1 + L2)(x) = L1(x) + L2(x)`` (RepVGG, ACNet, DiracNet, MobileOne; DBB where it does not pad between its layers).
Sums are visited in order, so nested ones merge from the inside out.

Conditions:

1. no nonlinearity and no second reader stands between the fork and the sum;
2. each branch composes into one map (:func:`rmfx.algebra.affine.compose`);
3. the two maps share stride, padding mode and tap grid (:func:`rmfx.algebra.affine.add`);
4. both have the same output size: equal excess, or equal sizes at the example inputs (a size condition).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from rmfx.errors import InexactError
from rmfx.graph.facts import shape_of
from rmfx.graph.region import Region, find_region, is_residual
from rmfx.graph.rule import Price, Refusal, Rule
from rmfx.layout.joins import JoinPlan, carry_out, check_dims, join_plan
from rmfx.layout.merging import merged
from rmfx.layout.problem import NewLayer, Solution
from rmfx.layout.reading import read_region

if TYPE_CHECKING:
    from rmfx.graph.editor import Editor


@dataclass(frozen=True)
class MergeBranches(Rule[Region, JoinPlan]):
    """Sum of parallel linear branches into one map."""

    name: ClassVar[str] = "merge_branches"

    def match(self, node: fx.Node) -> Region | None:
        if not is_residual(node):
            return None
        region = find_region(node)
        return region if isinstance(region, Region) and region.linear else None

    def check(self, match: Region) -> JoinPlan | Refusal:
        if (reason := check_dims(match)) is not None:
            return Refusal(match.join, reason)
        dims = match.dims
        assert dims is not None
        try:
            problem = read_region(match, dims, 1)
            total, same_size = merged(problem)
        except InexactError as error:
            return Refusal(match.join, str(error))
        if not same_size and shape_of(match.join) is None:
            return Refusal(match.join, "the branches have equal sizes at some input sizes only: pass example_inputs")
        shape = shape_of(match.join)
        positions = prod(shape[2:]) if dims and shape is not None else prod(1 / s for s in total.grid.stride)
        names = [op.name for op in problem.ops if op.kind == "linear"]
        layer = NewLayer(total, names[-1] if names else None)
        solution = Solution((layer,), total.macs_per_position * positions, frozenset(), (), not same_size)
        try:
            return join_plan(match, solution, dims)
        except InexactError as error:
            return Refusal(match.join, str(error))

    def price(self, plan: JoinPlan) -> Price:
        return plan.price

    def scope(self, plan: JoinPlan) -> tuple[fx.Node, ...]:
        return plan.scope

    def rewrite(self, plan: JoinPlan, editor: Editor) -> fx.Node:
        return carry_out(plan, editor)
