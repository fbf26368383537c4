"""Consecutive linear layers become one (the paper's equation 4).

    x -> L1 -> L2 -> y        becomes        x -> (L2 L1) -> y

    Z = W2 (W1 X + B1) + B2 = (W2 W1) X + (W2 B1 + B2)

for any two maps of the algebra: pointwise convolutions, a pointwise and a wider one, unpadded ones, and norms,
scales or average pools that earlier passes had to leave.

Conditions:

1. ``L1`` has no other reader;
2. the composition is exact (:func:`rmfx.algebra.affine.compose`), at every input size;
3. with ``fuse="cheaper"``, it does not raise MACs, nor parameters at equal MACs; a norm or scale always fuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from rmfx.algebra.affine import Affine, compose
from rmfx.errors import InexactError
from rmfx.graph.cost import cost_of, positions_of
from rmfx.graph.linear import affine_of, dims_of, is_linear, is_term_factor, mixes, size_dependent
from rmfx.graph.rule import Price, Refusal, Rule

if TYPE_CHECKING:
    from rmfx.graph.editor import Editor


@dataclass(frozen=True)
class FuseConvsMatch:
    """Two consecutive linear layers, at least one of which mixes channels."""

    inner: fx.Node
    outer: fx.Node


@dataclass(frozen=True, eq=False)
class FuseConvsPlan:
    """The two layers and the map of both."""

    match: FuseConvsMatch
    map: Affine
    price: Price


@dataclass(frozen=True)
class FuseConvs(Rule[FuseConvsMatch, FuseConvsPlan]):
    """Compose consecutive linear layers ``always``, only where that is ``cheaper``, or ``never`` (but for norms)."""

    name: ClassVar[str] = "fuse_convs"
    fuse: str = "cheaper"

    def match(self, node: fx.Node) -> FuseConvsMatch | None:
        if not is_linear(node) or len(node.all_input_nodes) != 1 or is_term_factor(node):
            return None
        inner = node.all_input_nodes[0]
        if not is_linear(inner) or len(inner.users) != 1 or not (mixes(node) or mixes(inner)):
            return None
        return FuseConvsMatch(inner, node)

    def check(self, match: FuseConvsMatch) -> FuseConvsPlan | Refusal:
        dims = dims_of(match.outer if mixes(match.outer) else match.inner)
        assert dims is not None
        try:
            outer, inner = affine_of(match.outer, dims), affine_of(match.inner, dims)
            composed = compose(outer, inner)
        except InexactError as error:
            return Refusal(match.outer, str(error))
        if size_dependent(match.inner) or size_dependent(match.outer):
            return Refusal(match.outer, "a pool among the two is a fixed map at the example inputs' sizes only")
        price = self._price(match, composed, dims)
        free = outer.diagonal or inner.diagonal
        if self.fuse == "never" and not free:
            return Refusal(match.outer, "not asked for: fuse='never'")
        if self.fuse == "cheaper" and price.growth > 1 and not free:
            return Refusal(match.outer, f"one layer would take {price.growth:.2f} times the MACs of the two")
        if self.fuse == "cheaper" and price.growth == 1 and price.params_after > price.params_before and not free:
            return Refusal(match.outer, "one layer would take the same MACs and more parameters")
        return FuseConvsPlan(match, composed, price)

    def _price(self, match: FuseConvsMatch, composed: Affine, dims: int) -> Price:
        macs, params = cost_of((match.inner, match.outer), dims)
        density = 1.0
        for stride in composed.grid.stride:
            density /= stride
        after = composed.macs_per_position * (positions_of(match.outer, dims) or density)
        return Price(macs, after, params, composed.parameters)

    def price(self, plan: FuseConvsPlan) -> Price:
        return plan.price

    def scope(self, plan: FuseConvsPlan) -> tuple[fx.Node, ...]:
        return plan.match.inner, plan.match.outer

    def rewrite(self, plan: FuseConvsPlan, editor: Editor) -> fx.Node:
        inner, outer = plan.match.inner, plan.match.outer
        name = str((outer if mixes(outer) else inner).target)
        fused = editor.linear(plan.map, inner.all_input_nodes[0], outer, name)
        editor.replace(outer, fused)
        editor.erase((outer, inner))
        return fused
