"""Makes a plan: runs the passes over a network, asking at each place whether and how a rewrite pays."""

from __future__ import annotations

from typing import Any

from torch import fx

from rmfx.algebra.recall import recalling
from rmfx.graph.pipeline import run_passes
from rmfx.graph.rewriter import sweep
from rmfx.graph.rule import PassResult, Price, Rule
from rmfx.plan.chains import Wish, choose
from rmfx.plan.follow import ALWAYS, options_of, origin_of
from rmfx.plan.piece import cut_out
from rmfx.plan.pricing import Priced, Pricer
from rmfx.plan.value import Choice

KEPT = "as it is, it is faster"


class Planner:
    """Decides place by place, and remembers what it decided.

    A rule with several variants (:meth:`rmfx.graph.rule.Rule.variants`) is decided along chains
    (:mod:`rmfx.plan.chains`) before it runs; any other one where it matches, by the price of that one rewrite.

    Args:
        pricer: for the target at hand.
    """

    def __init__(self, pricer: Pricer) -> None:
        self._pricer = pricer
        self._prices: dict[tuple[str, str], Priced] = {}
        self._forms: dict[str, Rule[Any, Any]] = {}  # variants of the rule at hand, by their options
        self._wishes: dict[str, Wish] = {}
        self._rule: Rule[Any, Any] | None = None
        self._variants: dict[tuple[str, str], dict[str, Any]] = {}

    @recalling()
    def run(self, gm: fx.GraphModule, passes: tuple[Rule[Any, Any], ...]) -> tuple[Choice, ...]:
        """Run ``passes`` over ``gm``, in place, and return what was decided.

        Args:
            gm: in normal form, with shapes.
        """
        results: list[PassResult] = []
        for rule in passes:
            self._forms = {str(options_of(variant)): variant for variant in rule.variants()}
            self._wishes = choose(gm, rule, self._pricer) if len(self._forms) > 1 else {}
            results += run_passes(gm, (rule,), self._veto, tune=self._tune)
        return tuple(choice for result in results for choice in self._choices(result))

    def _tune(self, node: fx.Node, rule: Rule[Any, Any]) -> Rule[Any, Any]:
        wish = self._wishes.get(origin_of(node))
        self._rule = rule if wish is None else self._forms.get(str(wish.variant), rule)
        return self._rule

    def _veto(self, node: fx.Node, plan: object, price: Price) -> str | None:
        rule = self._rule
        assert rule is not None
        if rule.name in ALWAYS:
            return None
        key = rule.name, origin_of(node)
        self._variants[key] = options_of(rule)
        if (wish := self._wishes.get(origin_of(node))) is not None:
            self._prices[key] = wish.price
            return None if wish.variant is not None else KEPT
        if len(self._forms) > 1:
            return KEPT  # legal here, but not in its place by itself
        self._prices[key] = found = self._local(rule, plan, node)
        pays = found.after < found.before or (found.after == found.before and price.growth < 1)
        return None if pays else KEPT

    def _local(self, rule: Rule[Any, Any], plan: object, node: fx.Node) -> Priced:
        """The price of one rewrite on its own."""
        scope = rule.scope(plan)
        before, after = cut_out(scope), cut_out(scope)
        here = origin_of(node)
        sweep(after, rule, lambda other, *_: None if origin_of(other) == here else "another place")
        return self._pricer.price(before, after)

    def _choices(self, result: PassResult) -> list[Choice]:
        if result.name in ALWAYS:
            return []
        found = [self._choice(result.name, item.origin, item.place, True) for item in result.applied]
        kept = (item for item in result.refused if item.kept)
        return found + [self._choice(result.name, item.origin, item.place, False) for item in kept]

    def _choice(self, rule: str, origin: str, place: str, applied: bool) -> Choice:
        price = self._prices.get((rule, origin))
        before, after = (None, None) if price is None else (price.before, price.after)
        measured = price is not None and price.measured
        variant = self._variants.get((rule, origin), {}) if applied else {}
        return Choice(rule, origin, place, applied, variant, before, after, measured)
