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

from rmfx.algebra.affine import Affine, add, dirac
from rmfx.algebra.grid import Grid
from rmfx.errors import InexactError
from rmfx.graph.facts import shape_of
from rmfx.graph.region import Chain, Region, find_region, is_residual
from rmfx.graph.rule import Price, Refusal, Rule
from rmfx.layout.joins import JoinPlan, carry_out, check_operands, composed, fork_value, join_plan, read_chain
from rmfx.layout.problem import NewLayer, Solution

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
        if (reason := check_operands(match)) is not None:
            return Refusal(match.join, reason)
        dims = match.dims
        assert dims is not None
        try:
            branch, shortcut = (_one_map(chain, match, dims) for chain in (match.branch, match.shortcut))
            merged = add(branch, shortcut)
        except InexactError as error:
            return Refusal(match.join, str(error))
        sized = branch.grid.excess != shortcut.grid.excess
        if sized and shape_of(match.join) is None:
            return Refusal(match.join, "the branches have equal sizes at some input sizes only: pass example_inputs")
        shape = shape_of(match.join)
        positions = prod(shape[2:]) if dims and shape is not None else prod(1 / s for s in merged.grid.stride)
        layer = NewLayer(merged, str(match.branch[-1].target) if match.branch else None)
        solution = Solution((layer,), merged.macs_per_position * positions, frozenset(), (), sized)
        return join_plan(match, solution, dims)

    def price(self, plan: JoinPlan) -> Price:
        return plan.price

    def rewrite(self, plan: JoinPlan, editor: Editor) -> fx.Node:
        return carry_out(plan, editor)


def _one_map(chain: Chain, region: Region, dims: int) -> Affine:
    """Condition 2."""
    channels = fork_value(region, dims).channels
    layers = composed(read_chain(chain, channels, dims))
    if not layers:
        return dirac(channels, Grid.sampling([1] * dims))
    if len(layers) > 1:
        raise InexactError(f"the chain to {chain[-1].name} does not compose: it pads between its layers")
    assert isinstance(layers[0].map, Affine)
    return layers[0].map
