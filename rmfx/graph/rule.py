"""The contract of a pass: match, check, price, rewrite, and the values that travel between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from torch import fx

if TYPE_CHECKING:
    from rmfx.graph.editor import Editor

Match = TypeVar("Match")
Plan = TypeVar("Plan")


@dataclass(frozen=True)
class Refusal:
    """Why a rule leaves a place as it is: a sentence a user can act on, naming the node."""

    node: fx.Node
    reason: str


@dataclass(frozen=True)
class Price:
    """What a rewrite costs: MACs for the example inputs (per fork position when there are none), parameters."""

    macs_before: float
    macs_after: float
    params_before: int
    params_after: int

    @property
    def growth(self) -> float:
        """MACs after divided by MACs before; 1.0 where there were none."""
        return self.macs_after / self.macs_before if self.macs_before else 1.0


class Rule(ABC, Generic[Match, Plan]):
    """One idea of rewriting. Subclasses are frozen dataclasses: their fields are options, there is no other state.

    ``name`` is the file name of the pass. The driver (:mod:`rmfx.graph.rewriter`) calls, for every node in order,
    ``match``, ``check``, ``price`` and ``rewrite``; only the last may change the graph, and only through the editor.
    """

    name: ClassVar[str]

    @abstractmethod
    def match(self, node: fx.Node) -> Match | None:
        """The structure around ``node`` that this rule is about, or ``None``: cheap, silent, changes nothing."""

    @abstractmethod
    def check(self, match: Match) -> Plan | Refusal:
        """Legality: everything ``rewrite`` needs, or the first broken condition of the pass's docstring."""

    @abstractmethod
    def price(self, plan: Plan) -> Price:
        """What the rewrite costs and what it replaces."""

    @abstractmethod
    def scope(self, plan: Plan) -> tuple[fx.Node, ...]:
        """All nodes between what the rewrite reads and the node it replaces, in graph order, that node last."""

    def variants(self) -> tuple[Rule[Match, Plan], ...]:
        """This rule with each of its options that may be the cheapest somewhere: what a planner chooses among."""
        return (self,)

    @abstractmethod
    def rewrite(self, plan: Plan, editor: Editor) -> fx.Node:
        """Carry the plan out; returns the node that now computes the matched node's value. May not fail."""


@dataclass(frozen=True)
class Applied:
    """One rewrite that was carried out."""

    place: str
    node: str
    origin: str
    price: Price
    plan: object


@dataclass(frozen=True)
class Refused:
    """One match that was left alone, with the reason; ``kept`` where it was legal but not wanted."""

    place: str
    node: str
    origin: str
    reason: str
    kept: bool = False
    price: Price | None = None
    plan: object = None


@dataclass(frozen=True)
class PassResult:
    """What one pass did."""

    name: str
    applied: tuple[Applied, ...] = ()
    refused: tuple[Refused, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether the graph is another one now."""
        return bool(self.applied)
