"""The driver: one forward sweep of a rule over a graph, nothing about any particular rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from rmfx.graph.editor import Editor
from rmfx.graph.rule import Applied, PassResult, Price, Refusal, Refused, Rule
from rmfx.graph.walk import forget_facts

# Says why a legal rewrite (node, plan, price) is not wanted, or None where it is: policies and growth limits.
Veto = Callable[[fx.Node, object, Price], str | None]
# Gives the variant of a rule (Rule.variants) to use at a node.
Tune = Callable[[fx.Node, Rule[Any, Any]], Rule[Any, Any]]


def want_all(node: fx.Node, plan: object, price: Price) -> str | None:
    """The veto that never objects."""
    return None


def as_it_is(node: fx.Node, rule: Rule[Any, Any]) -> Rule[Any, Any]:
    """The tune that changes nothing."""
    return rule


def sweep(gm: fx.GraphModule, rule: Rule[Any, Any], veto: Veto = want_all, tune: Tune = as_it_is) -> PassResult:
    """Apply ``rule``, in the variant that ``tune`` gives, wherever it matches, is legal and is not vetoed, in order.

    Rewrites insert before the matched node only, so one sweep sees inner structures before outer ones, and
    its own results as operands of later matches.
    """
    forget_facts(gm)
    editor = Editor(gm)
    applied: list[Applied] = []
    refused: list[Refused] = []
    for node in list(gm.graph.nodes):
        tuned = tune(node, rule)
        match = tuned.match(node)
        if match is None:
            continue
        plan = tuned.check(match)
        if isinstance(plan, Refusal):
            refused.append(Refused(*_where(node), plan.reason))
            continue
        price = tuned.price(plan)
        if (objection := veto(node, plan, price)) is not None:
            refused.append(Refused(*_where(node), objection, True, price, plan))
            continue
        where = _where(node)
        tuned.rewrite(plan, editor)
        applied.append(Applied(*where, price, plan))
    if applied:
        editor.finish()
    return PassResult(rule.name, tuple(applied), tuple(refused))


def _where(node: fx.Node) -> tuple[str, str, str]:
    return node.meta.get("place", ""), node.name, node.meta.get("origin", node.name)
