"""Residual connections across nonlinearities disappear: reserve and merge (the paper's section 3.1).

        +-- L1 - phi - L2 - phi - ... - Ln --+
    x --+                                    +--> z
        +-- S -------------------------------+

    becomes    x -> [L1; R] -> [phi; psi] -> [L2  0] -> [phi; psi] -> ... -> [Ln, S R'] -> z
                                             [0   I]

``R`` reserves a copy ``u`` of ``x`` (or of ``S x``, the paper's Figure 2a) by Dirac filters, ``psi`` is the identity on
it, and the last map merges ``Ln h + S u`` (its equation 3). Two nonlinear branches, branches that begin or end in an
activation, and nested sums are the same form with other blocks (:mod:`rmfx.layout.solve`).

Conditions:

1. between the fork and the join stand linear and pointwise layers, sums, concats, slices, gates and pools, nothing else
   reads any of them, and what does not depend on the fork only multiplies or is added (:mod:`rmfx.graph.region`);
2. no sum broadcasts;
3. some schedule of steps satisfies the conditions of :mod:`rmfx.layout.draft`.

A sum inside of which something is read that only comes together behind it (Res2Net) is removed together with the sum
or concat where it does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from rmfx.algebra.affine import Affine
from rmfx.algebra.carrier import SHIFT_BITS
from rmfx.algebra.pointwise import NORMS, identity_norm
from rmfx.errors import InexactError
from rmfx.graph.facts import rank_of
from rmfx.graph.region import Region, find_region, is_concat, is_residual
from rmfx.graph.rule import Price, Refusal, Rule
from rmfx.layout.joins import JoinPlan, carry_out, check_dims, join_plan
from rmfx.layout.problem import NewLayer, Solution, Wish
from rmfx.layout.reading import read_region
from rmfx.layout.solve import solve

if TYPE_CHECKING:
    from rmfx.graph.editor import Editor


@dataclass(frozen=True)
class RemoveResidual(Rule[Region | Refusal, JoinPlan]):
    """Reserve and merge.

    Attributes:
        carrier: ``auto``, ``direct``, ``masked``, ``split`` or ``shift`` (:mod:`rmfx.algebra.carrier`).
        downsample: where a projection shortcut is applied: ``conv`` as early as possible (Figure 2a), ``input`` as
            late as possible (Figure 2b), or where it is ``cheaper``.
        keep_norms: keep batch norms before nonlinearities, widened, for training.
        concat: remove concats of what starts at one tensor, too.
        shift_bits: of precision, that the carrier ``shift`` may cost.
        dense: leave convolutions that carry something ungrouped.
    """

    name: ClassVar[str] = "remove_residual"
    carrier: str = "auto"
    downsample: str = "cheaper"
    keep_norms: bool = False
    concat: bool = False
    shift_bits: float = SHIFT_BITS
    dense: bool = False

    def variants(self) -> tuple[RemoveResidual, ...]:
        """Each carrier, each place of a projection, grouped and dense; what the user asked for stays as it is."""
        carriers = ("auto", "split", "shift") if self.carrier == "auto" else (self.carrier,)
        sides = ("conv", "input") if self.downsample == "cheaper" else (self.downsample,)
        return (
            *(replace(self, carrier=carrier) for carrier in carriers),
            *(replace(self, downsample=side) for side in sides if side != self.downsample),
            replace(self, dense=True),
        )

    def match(self, node: fx.Node) -> Region | Refusal | None:
        if is_residual(node):
            return find_region(node)
        if not is_concat(node) or len(node.all_input_nodes) < 2:
            return None
        region = find_region(node)
        if isinstance(region, Region):
            return region if region.sums or self.concat else None
        return region if self.concat else None

    def check(self, match: Region | Refusal) -> JoinPlan | Refusal:
        if isinstance(match, Refusal):
            return match
        if (reason := check_dims(match)) is not None:
            return Refusal(match.join, reason)
        if self.keep_norms and match.linear:
            return Refusal(match.join, "parallel linear branches stay apart for training: each keeps its own norm")
        dims = match.dims
        assert dims is not None
        # counted from the end, channels are found with and without a batch dimension; PReLU must be sure of it
        axis = 1 if dims and rank_of(match.fork) == dims + 2 else -dims - 1
        try:
            problem = read_region(
                match, dims, axis, Wish(self.carrier, self.shift_bits, self.dense), self.downsample, self.keep_norms
            )
            solution = solve(problem)
            return join_plan(match, _with_norm_of_sum(solution) if self.keep_norms else solution, dims)
        except InexactError as error:
            return Refusal(match.join, str(error))

    def price(self, plan: JoinPlan) -> Price:
        return plan.price

    def scope(self, plan: JoinPlan) -> tuple[fx.Node, ...]:
        return plan.scope

    def rewrite(self, plan: JoinPlan, editor: Editor) -> fx.Node:
        return carry_out(plan, editor)


def _with_norm_of_sum(solution: Solution) -> Solution:
    """In training form the norm before the sum is folded, and an identity norm of the sum stands behind (A.3)."""
    norms = [layer.map for layer in solution.layers if isinstance(layer, NewLayer) and isinstance(layer.map, NORMS)]
    last = solution.layers[-1]
    if not norms or not isinstance(last, NewLayer) or not isinstance(last.map, Affine):
        return solution
    norm = identity_norm(norms[0], last.map.out_channels)
    return replace(solution, layers=(*solution.layers, NewLayer(norm, None)))
