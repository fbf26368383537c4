"""Keeps the books of a conversion: what stood there before, what each pass did, what became of every parameter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from rmfx.algebra.pointwise import CARRIED, NORMS
from rmfx.algebra.widened import is_identity_at
from rmfx.errors import RmfxError
from rmfx.graph.bounds import GIVEN
from rmfx.graph.cost import network_macs, network_parameters
from rmfx.graph.emit import UNTOUCHED
from rmfx.graph.facts import GIVEN_RANGE, module_of
from rmfx.graph.region import is_residual
from rmfx.graph.rewriter import Veto
from rmfx.graph.rule import Applied, PassResult, Price, Refused
from rmfx.graph.walk import ON_DEMAND
from rmfx.layout.joins import TAPS, JoinPlan
from rmfx.layout.stack import NEGATIONS, ROWS
from rmfx.report import Entry, PassLine, Report, Status, Totals, attached

# What only passes need of node.meta.
_SCRATCH = (
    *("affine", "range", "shape", "dtype", "rank", "plain_value", "made", TAPS, UNTOUCHED),
    *(GIVEN, GIVEN_RANGE, ROWS, NEGATIONS, ON_DEMAND),
)


@dataclass(frozen=True, eq=False)
class Before:
    """The network as it entered the passes.

    Attributes:
        sums: origin names of all residual sums, in order.
        names: the user's name of every tensor of the normalised network.
        owned: every name in the user's ``state_dict``.
        params, macs: of the whole network.
    """

    sums: tuple[str, ...]
    names: Mapping[str, str]
    owned: tuple[str, ...]
    params: int
    macs: int | None


def before(model: nn.Module, gm: fx.GraphModule) -> Before:
    """Take stock of the normalised network ``gm`` of ``model``."""
    sums = tuple(node.meta.get("origin", node.name) for node in gm.graph.nodes if is_residual(node))
    owned = dict(model.state_dict(keep_vars=True))
    owners = {_identity(t): name for name, t in reversed(list(owned.items()))}
    names = {name: owners.get(_identity(t), name) for name, t in gm.state_dict(keep_vars=True).items()}
    return Before(sums, names, tuple(owned), network_parameters(model), network_macs(gm))


def _identity(tensor: Tensor) -> tuple[int, int]:
    """Names a tensor by its memory: normalisation may have wrapped or viewed it, never copied it."""
    if tensor.is_meta:
        return id(tensor), 0
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset())


def veto(policy: str | Callable[[Entry], bool] | Collection[str], max_growth: float | None) -> Veto:
    """The user's say on every place that could be converted."""

    def objection(node: fx.Node, plan: object, price: Price) -> str | None:
        if not isinstance(plan, JoinPlan):
            return None
        if max_growth is not None and price.growth > max_growth:
            return f"MACs would grow {price.growth:.2f} times, more than max_growth={max_growth:g}"
        if isinstance(policy, str):
            return None
        where = (node.meta.get("place", ""), node.name, node.meta.get("origin", node.name))
        entries = _removed(Applied(*where, price, plan), plan)
        unwanted = [entry for entry in entries if not _is_wanted(entry, policy)]
        if not unwanted:
            return None
        inner = [entry.name for entry in unwanted if entry.node != where[2]]
        return "not asked for by policy" + (f" (it takes {', '.join(inner)} with it)" if inner else "")

    return objection


def _is_wanted(entry: Entry, policy: Callable[[Entry], bool] | Collection[str]) -> bool:
    return policy(entry) if callable(policy) else bool({entry.place, entry.node} & set(policy))


def check_places(policy: object, report: Report) -> None:
    """Refuse a list of places that names one which does not exist.

    Raises:
        RmfxError: listing the places there are.
    """
    if isinstance(policy, str) or callable(policy) or not isinstance(policy, Collection):
        return
    known = {name for entry in report.entries for name in (entry.place, entry.node)}
    if unknown := sorted(set(map(str, policy)) - known):
        places = ", ".join(entry.name for entry in report.entries) or "none"
        raise RmfxError(f"policy names {unknown[0]!r}, where no residual sum stands; there are: {places}")


def report_of(before: Before, results: tuple[PassResult, ...], gm: fx.GraphModule, notes: tuple[str, ...]) -> Report:
    """The report of a conversion, without its parameter map."""
    found: dict[str, Entry] = {}
    for result in results:
        for refused in result.refused:
            if refused.origin in before.sums:
                found[refused.origin] = _entry(refused)
    for result in results:
        for applied in result.applied:
            if isinstance(applied.plan, JoinPlan):
                found |= {entry.node: entry for entry in _removed(applied, applied.plan) if entry.node in before.sums}
    lines = tuple(
        PassLine(r.name, len(r.applied), tuple((f"{x.place}:{x.node}".lstrip(":"), x.reason) for x in _final(r, found)))
        for r in results
    )
    notes = (*notes, *_dropout_notes(results))
    totals = Totals(before.params, network_parameters(gm), before.macs, network_macs(gm))
    entries = tuple(found[name] for name in before.sums if name in found)
    return Report(entries, totals, lines, {}, notes, concat_conditions=_concat_conditions(results, found))


def _concat_conditions(results: tuple[PassResult, ...], found: Mapping[str, Entry]) -> tuple[str, ...]:
    """Conditions of joins that stand in no entry, since they are no sums."""
    plans = [applied.plan for result in results for applied in result.applied]
    told = {condition for entry in found.values() for condition in entry.size_conditions}
    return tuple(sorted({text for plan in plans if isinstance(plan, JoinPlan) for text in plan.conditions} - told))


def _final(result: PassResult, found: Mapping[str, Entry]) -> list[Refused]:
    """What a pass refused, but for the sums that went later, with a join behind them."""
    gone = {origin for origin, entry in found.items() if entry.status == "removed"}
    return [refused for refused in result.refused if refused.origin not in gone]


def _removed(applied: Applied, plan: JoinPlan) -> list[Entry]:
    """One entry for every sum that went with a join; the last one has the cost of all."""
    last = _entry(applied)
    places = [(place, origin) for place, origin in plan.covers if origin != applied.origin]
    if applied.origin not in {origin for _, origin in plan.covers} and places:
        place, origin = places.pop()
        last = replace(last, place=place, node=origin)
    return [*(Entry(place, origin, plan.kind, "removed", plan.carrier) for place, origin in places), last]


def _dropout_notes(results: tuple[PassResult, ...]) -> list[str]:
    plans = [applied.plan for result in results for applied in result.applied]
    names = [name for plan in plans if isinstance(plan, JoinPlan) for name in plan.dropouts]
    return [f"dropout {name} is gone: it stood beside a carried tensor and would act on that too" for name in names]


def _entry(item: Applied | Refused) -> Entry:
    status: Status = "removed" if isinstance(item, Applied) else "kept" if item.kept else "refused"
    reason = item.reason if isinstance(item, Refused) else None
    plan = item.plan
    if not isinstance(plan, JoinPlan) or item.price is None:
        return Entry(item.place, item.origin, "other", status, reason=reason)
    macs = (int(item.price.macs_before), int(item.price.macs_after)) if plan.counted else (None, None)
    return Entry(
        place=item.place,
        node=item.origin,
        kind=plan.kind,
        status=status,
        carrier=plan.carrier,
        reason=reason,
        macs_before=macs[0],
        macs_after=macs[1],
        params_before=item.price.params_before,
        params_after=item.price.params_after,
        size_conditions=plan.conditions,
    )


def with_names(report: Report, gm: fx.GraphModule, before: Before) -> Report:
    """``report`` with what is known once all layers have their names: carried taps and norms, the parameter map."""
    taps: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for node in gm.graph.nodes:
        for origin, indices in node.meta.get(TAPS, {}).items():
            taps.setdefault(origin, []).extend((f"{node.target}.weight", index) for index in indices)
    entries = tuple(replace(entry, carried_taps=tuple(taps.get(entry.node, ()))) for entry in report.entries)
    modules = {str(node.target): module_of(node) for node in gm.graph.nodes if node.op == "call_module"}
    carried = {name: _carried(module) for name, module in modules.items() if isinstance(module, NORMS)}
    carried = {name: channels for name, channels in carried.items() if channels}
    return replace(report, entries=entries, parameter_map=_parameter_map(gm, before), carried_norms=carried)


def _carried(norm: nn.Module) -> tuple[int, ...]:
    """The channels that a norm only carries: as marked, where it still is the identity on them."""
    same = is_identity_at(norm)
    return tuple(channel for channel in norm.__dict__.get(CARRIED, ()) if same[channel])


def mark_carried(gm: fx.GraphModule, model: nn.Module) -> None:
    """Mark norms of ``gm``, the normal form of ``model``, that carry channels: as its report says, if it has one."""
    told, modules = attached(model), dict(gm.named_modules())
    for name, channels in told.carried_norms.items() if told is not None else ():
        if isinstance(norm := modules.get(name), NORMS):
            norm.__dict__[CARRIED] = [channel for channel in channels if channel < norm.num_features]


def _parameter_map(gm: fx.GraphModule, before: Before) -> dict[str, tuple[str, ...]]:
    """From every name in the user's ``state_dict`` to the tensors that hold it now, whole or folded in."""
    found: dict[str, list[str]] = {name: [] for name in before.owned}
    for node in gm.graph.nodes:
        for source, target in _moves(node):
            if (owner := before.names.get(source)) in found and target not in found[owner]:
                found[owner].append(target)
    return {owner: tuple(targets) for owner, targets in found.items()}


def _moves(node: fx.Node) -> Iterator[tuple[str, str]]:
    affine = node.meta.get("affine")
    if affine is not None:
        targets = ("weight", "bias") if affine.has_bias else ("weight",)
        yield from ((source, f"{node.target}.{target}") for source in sorted(affine.sources) for target in targets)
    elif node.op == "get_attr":
        yield str(node.target), str(node.target)
    elif (module := module_of(node)) is not None:
        yield from ((f"{node.target}.{name}", f"{node.target}.{name}") for name in module.state_dict())


def clean(gm: fx.GraphModule) -> None:
    """Drop from nodes and layers what only passes need (it holds the user's tensors alive)."""
    for module in gm.modules():
        module.__dict__.pop(CARRIED, None)
    for node in gm.graph.nodes:
        for key in _SCRATCH:
            node.meta.pop(key, None)
