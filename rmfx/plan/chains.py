"""Chooses among the variants of a rule along chains of places, seams between neighbours included.

A *place* is an outermost match of the rule with everything between its inputs and outputs, and the activation behind
it. Its forms are: as it is; each variant of the rule applied to all matches inside; and to the inner ones only. Where
one place begins with the very tensor another ends with, the last layer of the one and the first of the other may be
composed; so may those of a place and of a layer outside. So the forms of a chain of places are chosen together, by
dynamic programming over (place, form)::

    best(i, f) = price(i, f) + min over g of [ best(i - 1, g) + seam(g, f) ]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from torch import fx

from rmfx.algebra.pointwise import is_pointwise
from rmfx.graph.facts import module_of
from rmfx.graph.linear import is_linear
from rmfx.graph.rewriter import sweep, want_all
from rmfx.graph.rule import Price, Refusal, Rule
from rmfx.passes.fuse_convs import FuseConvs
from rmfx.passes.lower_carried import LowerCarried
from rmfx.plan.follow import options_of, origin_of
from rmfx.plan.piece import cut_out, outputs_of, signature
from rmfx.plan.pricing import Priced, Pricer

_FAR = 2.0  # a form that much dearer is not worth looking for what could be beside it: its weights are large


@dataclass(frozen=True, eq=False)
class Form:
    """One way to write a place: ``rule`` applied to ``origins``, and what comes out; ``rule`` is ``None`` as it is."""

    rule: Rule[Any, Any] | None
    origins: tuple[str, ...]
    piece: fx.GraphModule
    price: Priced


@dataclass(frozen=True, eq=False)
class _Scope:
    """The node of a match, everything it is about, and the activation behind."""

    match: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def start(self) -> fx.Node | None:
        """The one tensor it reads, where it is one."""
        sources = {source for node in self.nodes for source in node.all_input_nodes} - set(self.nodes)
        return sources.pop() if len(sources) == 1 else None


@dataclass(eq=False)
class _Place:
    """A scope, its forms, and for each of them what seams are worth, and the cheapest chain that ends with it.

    Attributes:
        before: the place that ends where this one starts, by its index.
        seams: for each form, and each one of the place before, what composing across the border adds.
        outer: for each form, what composing with layers in no place adds.
    """

    scope: _Scope
    forms: list[Form]
    before: int | None = None
    seams: list[list[float]] = field(default_factory=list)
    outer: list[float] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    came_from: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Wish:
    """What was found best at one node: the options of the rule, ``None`` for leaving it alone, and the price."""

    variant: Mapping[str, Any] | None
    price: Priced


def choose(gm: fx.GraphModule, rule: Rule[Any, Any], pricer: Pricer) -> dict[str, Wish]:
    """For each node, by its origin, what to do there.

    Args:
        gm: a graph in normal form whose nodes know their shapes; left as it is.
        rule: with variants.
        pricer: of forms.
    """
    known: dict[str, tuple[list[str], list[Form]]] = {}
    places = [_Place(scope, _forms(scope, rule, pricer, known)) for scope in _outermost(gm, rule)]
    _find_seams(places, pricer)
    _lower(places, pricer)
    for place in places:
        before = places[place.before].best if place.before is not None else [0.0]
        for form, seams, outer in zip(place.forms, place.seams, place.outer, strict=True):
            costs = [best + seam for best, seam in zip(before, seams, strict=True)]
            cheapest = min(range(len(costs)), key=costs.__getitem__)
            place.best.append(costs[cheapest] + form.price.after + outer)
            place.came_from.append(cheapest)
    return _traced_back(places)


def _find_seams(places: Sequence[_Place], pricer: Pricer) -> None:
    starts = {place.scope.start for place in places}
    by_end: dict[fx.Node, int] = {}
    for index, place in enumerate(places):
        start, end = place.scope.start, place.scope.nodes[-1]
        place.before = by_end.get(start) if start is not None else None
        by_end[end] = index
        tails = None if place.before is None else [_tail(other.piece) for other in places[place.before].forms]
        for form in place.forms:
            head = _head(form.piece)
            place.seams.append([0.0] if tails is None else [_seam(tail, head, pricer) for tail in tails])
            place.outer.append(_outer_seams(place.scope, form, tails is not None, end in starts, pricer))


def _lower(places: Sequence[_Place], pricer: Pricer) -> None:
    """Prices forms with what they carry beside it again, where that is cheaper.

    Such a form has all the layers that were there before. So where nothing is measured, and a few bytes less are no
    reason to believe anything, only those are looked at which a seam may make worth it.
    """
    wanted: set[tuple[int, int]] = set()  # (place, form)
    for index, place in enumerate(places):
        outers = enumerate(place.outer)
        wanted |= {(index, k) for k, outer in outers if outer < 0 or (pricer.measures and place.forms[k].rule)}
        if place.before is not None:
            pairs = [(k, other) for k, seams in enumerate(place.seams) for other, seam in enumerate(seams) if seam < 0]
            wanted |= {which for k, other in pairs for which in ((index, k), (place.before, other))}
    known: dict[fx.GraphModule, Priced] = {}
    for index, k in sorted(wanted):
        as_is, form = places[index].forms[0], places[index].forms[k]
        if form.piece not in known:
            known[form.piece] = _cheapest(as_is.piece, form.piece, pricer).on(as_is.price.before)
        places[index].forms[k] = replace(form, price=known[form.piece])


def _traced_back(places: Sequence[_Place]) -> dict[str, Wish]:
    picked: dict[int, int] = {}
    for index in reversed(range(len(places))):
        place = places[index]
        if index not in picked:  # the last of its chain
            picked[index] = min(range(len(place.best)), key=place.best.__getitem__)
        if place.before is not None:
            picked.setdefault(place.before, place.came_from[picked[index]])
    wishes: dict[str, Wish] = {}
    for index, place in enumerate(places):
        form = place.forms[picked[index]]
        cheapest = min((f.price for f in place.forms[1:]), key=lambda price: price.after, default=form.price)
        for origin in {origin for f in place.forms for origin in f.origins}:
            taken = form.rule is not None and origin in form.origins
            options = options_of(form.rule) if taken and form.rule is not None else None
            wishes[origin] = Wish(options, form.price if taken else cheapest)
    return wishes


def _outermost(gm: fx.GraphModule, rule: Rule[Any, Any]) -> list[_Scope]:
    """Legal matches that lie in no other one."""
    found: list[_Scope] = []
    for node in gm.graph.nodes:
        match = rule.match(node)
        plan = None if match is None else rule.check(match)
        if plan is None or isinstance(plan, Refusal):
            continue
        nodes = rule.scope(plan)
        found = [scope for scope in found if scope.match not in nodes]
        found.append(_Scope(node, _with_activation(nodes)))
    return found


def _with_activation(scope: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """The scope and the activation behind it: some runtimes compute it together with a sum."""
    readers = list(scope[-1].users)
    module = module_of(readers[0]) if len(readers) == 1 else None
    return (*scope, readers[0]) if module is not None and is_pointwise(module) else scope


def _forms(
    scope: _Scope, rule: Rule[Any, Any], pricer: Pricer, known: dict[str, tuple[list[str], list[Form]]]
) -> list[Form]:
    """All forms of a place; places that look alike share them, each with its own names."""
    as_is = cut_out(scope.nodes)
    text = signature(as_is)
    names = [origin_of(node) for node in as_is.graph.nodes]
    if text not in known:
        known[text] = names, _all_forms(as_is, scope, rule, pricer)
    others, forms = known[text]
    mine = dict(zip(others, names, strict=True))
    return [replace(form, origins=tuple(mine[origin] for origin in form.origins)) for form in forms]


def _all_forms(as_is: fx.GraphModule, scope: _Scope, rule: Rule[Any, Any], pricer: Pricer) -> list[Form]:
    """The place as it is, then every other way to write it."""
    outer = origin_of(scope.match)

    def only_inner(node: fx.Node, plan: object, price: Price) -> str | None:
        return "the outermost one" if origin_of(node) == outer else None

    found: list[Form] = []
    seen = {signature(as_is)}
    several = sum(rule.match(node) is not None for node in as_is.graph.nodes) > 1
    for variant, veto in product(rule.variants(), (want_all, only_inner) if several else (want_all,)):
        piece = cut_out(scope.nodes)
        result = sweep(piece, variant, veto)
        sweep(piece, FuseConvs())
        text = signature(piece)
        if not result.changed or text in seen:
            continue
        seen.add(text)
        origins = tuple(applied.origin for applied in result.applied)
        found.append(Form(variant, origins, piece, pricer.price(as_is, piece)))
    base = next((form.price.before for form in found if form.price.measured), pricer.estimate(as_is))
    return [Form(None, (), as_is, Priced(base, base)), *(replace(f, price=f.price.on(base)) for f in found)]


def _cheapest(as_is: fx.GraphModule, piece: fx.GraphModule, pricer: Pricer) -> Priced:
    """The price of a form, or that of the form with what it carries beside it again."""
    price = pricer.price(as_is, piece)
    if not price.before < price.after <= _FAR * price.before or not is_linear(outputs_of(piece)[0]):
        return price  # nothing is composed with an activation
    lowered = cut_out([node for node in piece.graph.nodes if node.op not in ("placeholder", "output")])
    if not sweep(lowered, LowerCarried(patient=False, beside=True)).changed:
        return price
    other = pricer.price(as_is, lowered)
    return other if other.after < price.after else price


def _tail(piece: fx.GraphModule) -> fx.Node:
    return outputs_of(piece)[0]


def _head(piece: fx.GraphModule) -> fx.Node | None:
    """The only node that reads the first input of a piece."""
    readers = list(next(node for node in piece.graph.nodes if node.op == "placeholder").users)
    return readers[0] if len(readers) == 1 else None


def _outer_seams(scope: _Scope, form: Form, chained: bool, goes_on: bool, pricer: Pricer) -> float:
    """What composing with the layers before and behind adds, where these are in no place themselves."""
    total = 0.0
    start, readers = scope.start, list(scope.nodes[-1].users)
    if not chained and start is not None and all(user in scope.nodes for user in start.users):
        total += _seam(start, _head(form.piece), pricer)
    if not goes_on and len(readers) == 1:
        total += _seam(_tail(form.piece), readers[0], pricer)
    return total


def _seam(last: fx.Node, first: fx.Node | None, pricer: Pricer) -> float:
    """What composing two consecutive layers adds in milliseconds: at most 0."""
    if first is None or not is_linear(last) or not is_linear(first):
        return 0.0
    joined, apart = joined_layers(last, first), joined_layers(last, first)
    if not sweep(joined, FuseConvs("always")).changed:
        return 0.0
    return min(0.0, -pricer.price(apart, joined).gain)


def joined_layers(first: fx.Node, second: fx.Node) -> fx.GraphModule:
    """A graph of two layers of two graphs, the second reading what the first gives."""
    graph = fx.Graph()
    root: dict[str, Any] = {}
    source = first.all_input_nodes[0]
    value = graph.placeholder("x")
    value.meta = dict(source.meta)
    for index, node in enumerate((first, second)):
        module = module_of(node)
        assert module is not None
        root[f"layer{index}"] = module
        value = graph.call_module(f"layer{index}", (value,))
        value.meta = dict(node.meta)
    graph.output(value)
    return fx.GraphModule(root, graph)
