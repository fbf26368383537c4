"""Batch norms and per-channel scales disappear into a neighbouring convolution or linear layer.

    x -> conv(W, b) -> norm(s, t) -> y        becomes        x -> conv(s*W, s*b + t) -> y
    x -> norm(s, t) -> conv(W, b) -> y        becomes        x -> conv(W*s, b + W*t) -> y

with ``s = gamma / sqrt(var + eps)``, ``t = beta - mean * s`` (the paper's equation 2 solved for any ``gamma, beta``).

Conditions:

1. the norm has running statistics;
2. the layer before has no other reader (its weights have none: one call site per module), and then always;
3. else the norm has one reader, a convolution or linear layer, and that one does not zero-pad where the shift
   should stand (``W*t`` is missing at the border), or there is no shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from rmfx.algebra.affine import Affine, compose
from rmfx.errors import InexactError
from rmfx.graph.cost import cost_of
from rmfx.graph.facts import module_of
from rmfx.graph.linear import PER_CHANNEL, affine_of, dims_of, is_term_factor, mixes
from rmfx.graph.rule import Price, Refusal, Rule

if TYPE_CHECKING:
    from rmfx.graph.editor import Editor


@dataclass(frozen=True)
class FoldNormMatch:
    """A per-channel layer and its neighbours: ``before`` where only it reads them, ``after`` its only reader."""

    norm: fx.Node
    before: fx.Node | None
    after: fx.Node | None


@dataclass(frozen=True, eq=False)
class FoldNormPlan:
    """Two neighbouring nodes and the map of both; ``first`` runs first, ``mixing`` gives the name."""

    first: fx.Node
    second: fx.Node
    mixing: fx.Node
    map: Affine


@dataclass(frozen=True)
class FoldNorm(Rule[FoldNormMatch, FoldNormPlan]):
    """Fold batch norms and per-channel scales into the layer before, or else into the one after."""

    name: ClassVar[str] = "fold_norm"

    def match(self, node: fx.Node) -> FoldNormMatch | None:
        if type(module_of(node)) not in PER_CHANNEL or len(node.all_input_nodes) != 1 or is_term_factor(node):
            return None
        producer, readers = node.all_input_nodes[0], list(node.users)
        before = producer if mixes(producer) and len(producer.users) == 1 else None
        after = readers[0] if len(readers) == 1 and mixes(readers[0]) else None
        return FoldNormMatch(node, before, after) if before or after else None

    def check(self, match: FoldNormMatch) -> FoldNormPlan | Refusal:
        refusal: Refusal | None = None
        for first, second in ((match.before, match.norm), (match.norm, match.after)):
            if first is None or second is None:
                continue
            mixing = second if first is match.norm else first
            dims = dims_of(mixing)
            assert dims is not None
            try:
                return FoldNormPlan(first, second, mixing, compose(affine_of(second, dims), affine_of(first, dims)))
            except InexactError as error:
                refusal = refusal or Refusal(match.norm, str(error))
        assert refusal is not None
        return refusal

    def price(self, plan: FoldNormPlan) -> Price:
        dims = plan.map.grid.dims
        macs, params = cost_of((plan.first, plan.second), dims)
        return Price(macs, macs, params, plan.map.parameters)

    def scope(self, plan: FoldNormPlan) -> tuple[fx.Node, ...]:
        return plan.first, plan.second

    def rewrite(self, plan: FoldNormPlan, editor: Editor) -> fx.Node:
        source = plan.first.all_input_nodes[0]
        folded = editor.linear(plan.map, source, plan.first, str(plan.mixing.target))
        editor.replace(plan.second, folded)
        editor.erase((plan.second, plan.first))
        return folded
