"""Plans a whole network: prices its places, then times the outcome against the network as it is.

Prices of places are estimates, or measured apart from their surroundings, so the last word is a trial of whole
networks: what the plan makes, in each memory layout worth trying, against the original, in interleaved pairs. Where
nothing is faster, the plan is to do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rmfx.copying import deep_copy
from rmfx.errors import PlanError
from rmfx.measure.paired import Comparison, compare
from rmfx.measure.runners import runner
from rmfx.options import Options
from rmfx.passes import planned_passes
from rmfx.plan.cache import PriceCache
from rmfx.plan.planner import Planner
from rmfx.plan.pricing import OnStep, Pricer
from rmfx.plan.value import Plan
from rmfx.prepare import Prepared, prepare
from rmfx.rewrite import removal_of, rewrite

_TRIAL_SECONDS = 3.0  # for one pair of networks, at most
_TRIAL_SHARE = 0.1  # of the time for measuring
_TRIAL_PAIRS = 30


def plan_network(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    kwargs: Mapping[str, Any],
    options: Options,
    *,
    cache: PriceCache | None = None,
    on_step: OnStep | None = None,
) -> Plan:
    """The plan for ``model`` on ``options.target``; arguments and errors are those of :func:`rmfx.make_plan`."""
    prepared = prepare(model, example_inputs, kwargs, value_ranges=options.value_ranges)
    inputs = _positional(prepared)
    target = options.target
    eager = target.runtime == "eager"
    channels_last = eager and target.device == "cpu" and any(x.dim() == 4 for x in inputs)
    pricer = Pricer(target, options.seconds, cache or PriceCache(), on_step, channels_last=channels_last)
    choices = Planner(pricer).run(prepared.gm, planned_passes(removal_of(options)))
    plan = Plan(
        target,
        tuple(tuple(x.shape) for x in inputs),
        choices,
        channels_last=channels_last,
        in_place=eager,
    )
    if not options.seconds:
        return plan
    return _tried(plan, prepared, inputs, options, on_step)


def _positional(prepared: Prepared) -> tuple[Tensor, ...]:
    args = prepared.args
    if args is None:
        raise PlanError("policy='auto' needs example_inputs: prices follow from shapes")
    if prepared.kwargs or not all(isinstance(x, torch.Tensor) for x in args):
        raise PlanError("policy='auto' takes positional tensors as example_inputs only")
    return args


def _tried(
    plan: Plan, prepared: Prepared, inputs: tuple[Tensor, ...], options: Options, on_step: OnStep | None
) -> Plan:
    """The fastest of the plan's alternatives, or to do nothing."""
    original = runner(deep_copy(prepared.original), inputs, plan.target)
    seconds = min(_TRIAL_SECONDS, _TRIAL_SHARE * options.seconds)
    found: list[tuple[Comparison, Plan]] = []
    for label, candidate in _alternatives(plan):
        if on_step is not None:
            on_step(f"the whole network, {label}")
        network = rewrite(deep_copy(prepared.original), inputs, {}, replace(options, policy=candidate), False)
        call = runner(network, inputs, plan.target)
        found.append((compare(label, original, call, pairs=_TRIAL_PAIRS, seconds=seconds), candidate))
    best, chosen = min(found, key=lambda item: item[0].interval[1])  # the surest one wins, not the luckiest
    notes = tuple(f"whole network: {comparison}" for comparison, _ in found)
    if best.verdict == "slower":
        return Plan(plan.target, plan.shapes, original=True, notes=notes)
    return replace(chosen, notes=notes)


def _alternatives(plan: Plan) -> list[tuple[str, Plan]]:
    """The plan; in the other memory layout; and without what removes sums or composes layers."""
    kept = tuple(replace(c, applied=c.applied and c.rule == "merge_branches", variant={}) for c in plan.choices)
    found = [("as planned", plan)]
    if plan.channels_last:
        found.append(("contiguous", replace(plan, channels_last=False)))
    if kept != plan.choices:
        found.append(("norms folded, linear branches merged", replace(plan, choices=kept)))
    return found
