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

1. between fork and sum stand two chains of linear and pointwise layers, each read by the next alone;
2. the sum does not broadcast;
3. some schedule of steps satisfies the conditions of :mod:`rmfx.layout.solve`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from rmfx.algebra.affine import Affine
from rmfx.algebra.pointwise import NORMS, identity_norm
from rmfx.errors import InexactError
from rmfx.graph.facts import rank_of
from rmfx.graph.region import Region, find_region, is_residual
from rmfx.graph.rule import Price, Refusal, Rule
from rmfx.layout.joins import JoinPlan, carry_out, check_operands, composed, fork_value, join_plan, read_chain
from rmfx.layout.problem import NewLayer, Problem, Solution
from rmfx.layout.solve import solve

if TYPE_CHECKING:
    from rmfx.graph.editor import Editor


@dataclass(frozen=True)
class RemoveResidual(Rule[Region | Refusal, JoinPlan]):
    """Reserve and merge.

    Attributes:
        carrier: ``auto``, ``direct``, ``masked`` or ``split`` (:mod:`rmfx.algebra.carrier`).
        downsample: where a projection shortcut is applied: ``conv`` as early as possible (Figure 2a), ``input`` as
            late as possible (Figure 2b), or where it is ``cheaper``.
        keep_norms: keep batch norms before nonlinearities, widened, for training.
    """

    name: ClassVar[str] = "remove_residual"
    carrier: str = "auto"
    downsample: str = "cheaper"
    keep_norms: bool = False

    def match(self, node: fx.Node) -> Region | Refusal | None:
        return find_region(node) if is_residual(node) else None

    def check(self, match: Region | Refusal) -> JoinPlan | Refusal:
        if isinstance(match, Refusal):
            return match
        if (reason := check_operands(match)) is not None:
            return Refusal(match.join, reason)
        if self.keep_norms and match.linear:
            return Refusal(match.join, "parallel linear branches stay apart for training: each keeps its own norm")
        dims = match.dims
        assert dims is not None
        try:
            solution = self._solve(match, dims)
        except InexactError as error:
            return Refusal(match.join, str(error))
        return join_plan(match, solution, dims)

    def _solve(self, region: Region, dims: int) -> Solution:
        fork = fork_value(region, dims)
        branch = read_chain(region.branch, fork.channels, dims, self.keep_norms)
        shortcut = read_chain(region.shortcut, fork.channels, dims, self.keep_norms)
        # counted from the end, channels are found with and without a batch dimension; PReLU must be sure of it
        axis = 1 if dims and rank_of(region.fork) == dims + 2 else -dims - 1
        solutions = []
        reason: InexactError | None = None
        for variant in dict.fromkeys((composed(shortcut), shortcut)):
            chains = (branch, variant)
            problem = Problem(fork, chains, dims, self.carrier, self.downsample, axis)
            try:
                solutions.append(solve(problem))
            except InexactError as error:
                reason = reason or error
        if not solutions:
            raise reason or InexactError("no layout")
        best = min(solutions, key=lambda solution: (solution.macs, len(solution.layers)))
        return _with_norm_of_sum(best) if self.keep_norms else best

    def price(self, plan: JoinPlan) -> Price:
        return plan.price

    def rewrite(self, plan: JoinPlan, editor: Editor) -> fx.Node:
        return carry_out(plan, editor)


def _with_norm_of_sum(solution: Solution) -> Solution:
    """In training form the norm before the sum is folded, and an identity norm of the sum stands behind (A.3)."""
    norms = [layer.map for layer in solution.layers if isinstance(layer.map, NORMS)]
    last = solution.layers[-1].map
    if not norms or not isinstance(last, Affine):
        return solution
    return replace(solution, layers=(*solution.layers, NewLayer(identity_norm(norms[0], last.out_channels), None)))
