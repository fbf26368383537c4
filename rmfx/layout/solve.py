"""Lays a region out as a plain sequence of layers over one stacked tensor: reserve and merge in general form.

For two chains from a fork to a join, every schedule of steps (:mod:`rmfx.layout.schedule`) is drafted
(:mod:`rmfx.layout.draft`), shortest first; each linear step gets its cheapest grouped form
(:mod:`rmfx.layout.grouping`) and each pointwise step one layer that holds what it applies and what it carries. A
schedule that breaks a condition is discarded; when none is left, the first reason is the refusal.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from torch import nn

from rmfx.algebra.affine import Affine
from rmfx.algebra.pointwise import Part, combine
from rmfx.errors import InexactError
from rmfx.layout.draft import Draft
from rmfx.layout.grouping import Form, build, choose_forms, dirac_taps
from rmfx.layout.problem import NewLayer, Problem, Solution
from rmfx.layout.schedule import Kind, schedules

MOST_SCHEDULES = 2000  # bounds planning time; two chains of five layers have about 1,700


def solve(problem: Problem) -> Solution:
    """The cheapest layout among those with the fewest steps.

    Raises:
        InexactError: when no schedule satisfies the conditions, with the first broken one.
    """
    kinds: list[tuple[Kind, ...]] = [
        tuple("linear" if isinstance(layer.map, Affine) else "pointwise" for layer in chain) for chain in problem.chains
    ]
    found: list[_Candidate] = []
    reason: InexactError | None = None
    for steps in islice(schedules(kinds[0], kinds[1]), MOST_SCHEDULES):
        if found and len(steps) > len(found[0].draft.names):
            break
        try:
            found.append(_candidate(Draft(problem, steps)))
        except InexactError as error:
            reason = reason or error
    if not found:
        raise reason or InexactError("no sequence of layers joins the two branches")
    wish = {"conv": 1, "input": -1}.get(problem.downsample, 0)
    best = min(found, key=lambda c: (wish * c.draft.shortcut_applied, c.macs, c.draft.masked_channels))
    return best.solution()


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A legal schedule with the cheapest forms of its linear steps."""

    draft: Draft
    forms: tuple[Form, ...]
    activations: tuple[nn.Module, ...]

    @property
    def macs(self) -> float:
        """MACs of all linear steps."""
        return sum(form.macs(step) for form, step in zip(self.forms, self.draft.linear_steps, strict=True))

    def solution(self) -> Solution:
        """Build the maps of the chosen forms."""
        draft = self.draft
        linear = iter([build(step, form) for step, form in zip(draft.linear_steps, self.forms, strict=True)])
        pointwise = iter(self.activations)
        maps = [next(linear) if kind == "linear" else next(pointwise) for kind in draft.kinds]
        carried: tuple[tuple[int, tuple[int, ...]], ...] = ()
        if draft.dirac is not None and draft.carriers:
            index, key = draft.dirac
            where = [i for i, kind in enumerate(draft.kinds) if kind == "linear"][index]
            taps = dirac_taps(draft.linear_steps[index], self.forms[index], key)
            carried = tuple((where, tap) for tap in taps)
        layers = tuple(NewLayer(new, name) for new, name in zip(maps, draft.names, strict=True))
        return Solution(layers, self.macs, frozenset(draft.carriers), carried, draft.sized)


def _candidate(draft: Draft) -> _Candidate:
    forms = choose_forms(draft.linear_steps)
    kinds = [i for i, kind in enumerate(draft.kinds) if kind == "pointwise"]
    layers = []
    for index, parts in zip(kinds, draft.activations, strict=True):
        step_before = draft.kinds[:index].count("linear") - 1
        layers.append(_activation(draft, parts, step_before, forms[step_before]))
    return _Candidate(draft, forms, tuple(layers))


def _activation(draft: Draft, parts: tuple[nn.Module | None, ...], step: int, form: Form) -> nn.Module:
    """One layer for a pointwise step, over the channels as the linear step before it lays them out."""
    widths = draft.linear_steps[step].after
    segments = zip(parts, form.after.spreads, widths, strict=True)
    placed = [Part(part, spread.positions(width)) for part, spread, width in segments]
    layer = combine(placed, form.after.width, draft.problem.channel_axis)
    if layer is None:
        names = " and ".join(sorted({type(part).__name__ for part in parts if part is not None}))
        raise InexactError(f"no single layer applies {names} to some channels and carries the others")
    return layer
