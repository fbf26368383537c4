"""Lays a region out as a plain sequence of layers over one stacked tensor: reserve and merge in general form.

Every schedule of steps (:mod:`rmfx.layout.schedule`) is drafted (:mod:`rmfx.layout.draft`), shortest first; each
linear step gets its cheapest grouped form (:mod:`rmfx.layout.grouping`) and each nonlinear step one layer that holds
what it applies and what it carries. A schedule that breaks a condition is discarded; when none is left, the first
reason is the refusal.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import islice

from torch import nn

from rmfx.algebra.affine import Affine, uniform
from rmfx.algebra.pointwise import Part, combine
from rmfx.errors import InexactError
from rmfx.layout.draft import Draft
from rmfx.layout.flow import Flow, shortcut_values
from rmfx.layout.grouping import Form, Layout, LinearStep, build, choose_forms, dirac_taps
from rmfx.layout.problem import NewGate, NewLayer, Problem, Solution, Wish
from rmfx.layout.schedule import schedules
from rmfx.layout.segments import Column, Nonlinear
from rmfx.layout.simplify import absorb_diagonals, compose_paths

MOST_SCHEDULES = 2000  # bounds planning time; two chains of five layers have about 1,700
MOST_IDLE = 200  # schedules in a row that break a condition, or are no cheaper


def solve(problem: Problem) -> Solution:
    """The cheapest layout among those with the fewest steps.

    Raises:
        InexactError: when no schedule satisfies the conditions, with the first broken one.
    """
    plain = absorb_diagonals(problem)
    shortcuts = shortcut_values(plain)
    variants = (compose_paths(plain, shortcuts), plain) if len(shortcuts) > 1 else (plain,)
    found: list[_Candidate] = []
    reason: InexactError | None = None
    for wish in _wishes(problem.carrier):
        for variant in variants:
            try:
                found.append(_best(variant, wish))
            except InexactError as error:
                reason = reason or error
        if found:
            break
    if not found:
        assert reason is not None
        raise reason
    return min(found, key=lambda candidate: (candidate.macs, len(candidate.draft.kinds))).solution()


def _wishes(wanted: Wish) -> tuple[Wish, ...]:
    """The carriers to try in turn. Splitting doubles what is carried: only where no single layer masks."""
    return (wanted, replace(wanted, carrier="split")) if wanted.carrier == "auto" else (wanted,)


def _best(problem: Problem, wish: Wish) -> _Candidate:
    flow = Flow(problem)
    late = {"conv": 1, "input": -1}.get(problem.downsample, 0)
    best: _Candidate | None = None
    reason: InexactError | None = None
    idle = 0
    for steps in islice(schedules(flow.tasks), MOST_SCHEDULES):
        if idle > MOST_IDLE or (best is not None and len(steps) > len(best.draft.kinds)):
            break
        idle += 1
        try:
            candidate = _candidate(Draft(flow, steps, wish))
        except InexactError as error:
            reason = reason or error
            continue
        if best is None or candidate.rank(late) < best.rank(late):
            best, idle = candidate, 0
    if best is None:
        raise reason or InexactError(
            f"the {len(flow.tasks)} operations between fork and join can be put in order in more ways than are tried, "
            "and none of those tried makes them one sequence of layers"
        )
    return best


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A legal schedule with the cheapest forms of its linear steps."""

    draft: Draft
    forms: tuple[Form, ...]
    activations: tuple[nn.Module | NewGate, ...]

    @property
    def macs(self) -> float:
        """MACs of all linear steps."""
        return sum(form.macs(step) for form, step in zip(self.forms, self.draft.linear_steps, strict=True))

    def rank(self, late: int) -> tuple[float, ...]:
        """Less is better: the shortcut applied early (``late`` 1) or late (-1), MACs, masked channels."""
        return late * self.draft.shortcut_applied, self.macs, self.draft.masked_channels

    def solution(self) -> Solution:
        """Build the maps of the chosen forms."""
        draft = self.draft
        linear = iter([build(step, form) for step, form in zip(draft.linear_steps, self.forms, strict=True)])
        between = iter(self.activations)
        carried: tuple[tuple[int, tuple[int, ...]], ...] = ()
        if draft.dirac is not None and draft.carriers:
            index, key = draft.dirac
            where = [i for i, kind in enumerate(draft.kinds) if kind == "linear"][index]
            taps = dirac_taps(draft.linear_steps[index], self.forms[index], key)
            carried = tuple((where, tap) for tap in taps)
        layers: list[NewLayer | NewGate] = []
        for kind, name in zip(draft.kinds, draft.names, strict=True):
            made = next(linear) if kind == "linear" else next(between)
            layers.append(made if isinstance(made, NewGate) else NewLayer(made, name))
        return Solution(tuple(layers), self.macs, frozenset(draft.carriers), carried, draft.sized)


def _candidate(draft: Draft) -> _Candidate:
    forms = choose_forms(draft.linear_steps, dense=draft.problem.carrier.dense)
    return _Candidate(draft, forms, tuple(_nonlinear(draft, step, forms[step.step]) for step in draft.nonlinear))


def _nonlinear(draft: Draft, step: Nonlinear, form: Form) -> nn.Module | NewGate:
    """One layer for a nonlinear step, over the channels as the linear step before it lays them out."""
    widths = draft.linear_steps[step.step].after
    if step.stage is not None:
        return copy.deepcopy(step.stage)
    if step.gate is not None:
        return _gate(draft, step, form.after, widths)
    segments = zip(step.parts, form.after.spreads, widths, strict=True)
    placed = [Part(part, spread.positions(width)) for part, spread, width in segments]
    layer = combine(placed, form.after.width, draft.problem.channel_axis)
    if layer is None:
        names = " and ".join(sorted({type(part).__name__ for part in step.parts if part is not None}))
        raise InexactError(f"no single layer applies {names} to some channels and carries the others")
    return layer


def _gate(draft: Draft, step: Nonlinear, layout: Layout, widths: tuple[int, ...]) -> NewGate:
    gate = step.gate
    assert gate is not None
    active = [-1] * layout.width
    for segment, start in step.gated:
        for channel, position in enumerate(layout.spreads[segment].positions(widths[segment]).tolist()):
            active[position] = start + channel if gate.channels > 1 else 0
    reads = tuple(_read(draft, read, layout, widths) for read in step.reads)
    picks = tuple(all([c[1:] for c in columns] == [(1.0, 0.0)] for columns in read) for read in step.reads)
    behind = tuple(index in gate.behind for index in range(len(reads)))
    return NewGate(gate.key, reads, tuple(active), gate.channels, picks, behind)


def _read(draft: Draft, values: tuple[tuple[Column, ...], ...], layout: Layout, widths: tuple[int, ...]) -> Affine:
    """The map from the stack to a tensor that a gate reads."""
    blocks = {
        (row, segment): uniform(widths[segment], draft.problem.dims, factor, shift)
        for row, columns in enumerate(values)
        for segment, factor, shift in columns
    }
    rows = tuple(widths[columns[0][0]] for columns in values)
    step = LinearStep(blocks, widths, rows, 1.0, 1)
    return build(step, Form(1, layout, Layout.natural(rows)))
