"""Carries a plan out: tells the passes, place by place, what was decided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from torch import fx

from rmfx.errors import PlanError, RmfxError
from rmfx.graph.rule import PassResult, Price, Refused, Rule
from rmfx.options import Options
from rmfx.plan.value import Choice, Plan

ALWAYS = frozenset({"fold_norm"})  # what folds is never dearer, so plans do not speak of it


def origin_of(node: fx.Node) -> str:
    """The name by which plans know a node: the one it had in the traced model."""
    return str(node.meta.get("origin", node.name))


def options_of(rule: Rule[Any, Any]) -> dict[str, Any]:
    """The options of ``rule`` that are not its defaults."""
    given = {field.name: getattr(rule, field.name) for field in fields(rule)}  # type: ignore[arg-type]
    defaults = {field.name: field.default for field in fields(rule) if field.default is not MISSING}  # type: ignore[arg-type]
    return {name: value for name, value in given.items() if value != defaults.get(name, MISSING)}


_OPTIONS = {"carrier", "downsample", "fuse", "shift_bits"}  # of rules, that a conversion has by the same names


class Follower:
    """A plan as what :func:`rmfx.graph.pipeline.run_passes` asks: ``veto`` and ``tune``."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._choices: Mapping[tuple[str, str], Choice] = {(c.rule, c.node): c for c in plan.choices}
        self._rules: dict[fx.Node, str] = {}

    def tune(self, node: fx.Node, rule: Rule[Any, Any]) -> Rule[Any, Any]:
        """``rule`` with the options that the plan has for ``node``."""
        self._rules[node] = rule.name
        choice = self._choices.get((rule.name, origin_of(node)))
        if choice is None or not choice.variant:
            return rule
        try:
            tuned = replace(rule, **choice.variant)  # type: ignore[type-var]
            Options(**{name: value for name, value in choice.variant.items() if name in _OPTIONS})
        except RmfxError as problem:
            raise PlanError(f"the plan gives {rule.name} a bad option, at {choice.node}: {problem}") from problem
        except TypeError as problem:
            raise PlanError(
                f"the plan gives {rule.name} options it does not have, at {choice.node}: {problem}"
            ) from problem
        return tuned

    def veto(self, node: fx.Node, plan: object, price: Price) -> str | None:
        """An objection where the plan leaves the place as it is."""
        name = self._rules[node]
        choice = self._choices.get((name, origin_of(node)))
        return None if name in ALWAYS or (choice is not None and choice.applied) else "kept by the plan"

    def demand_done(self, results: Iterable[PassResult]) -> None:
        """Check that all was done that the plan decided.

        Raises:
            PlanError: naming the place, and the condition that is broken there.
        """
        done: set[tuple[str, str]] = set()
        refused: dict[tuple[str, str], Refused] = {}
        for result in results:
            done |= {(result.name, applied.origin) for applied in result.applied}
            refused |= {(result.name, item.origin): item for item in result.refused}
        for choice in self._plan.choices:
            key = choice.rule, choice.node
            if choice.applied and key not in done:
                why = f": {refused[key].reason}" if key in refused else ": the model has no such place"
                raise PlanError(
                    f"the plan cannot be followed at {choice.place or '-'}:{choice.node} ({choice.rule}){why}"
                )
