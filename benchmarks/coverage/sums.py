"""Pairs the residual sums of a network with what the report says of each, and makes reasons countable."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from benchmarks.coverage.classes import Census, ResidualSum
from rmfx import account
from rmfx.report import Report

UNMENTIONED = "no entry in the report"
_QUOTED = re.compile(r"'[^']*'( \(in [^)]*\))?")
_NUMBERED = re.compile(r"\b[A-Za-z]\w*(?:\.\w+)*(?:_\d+|\.\w*\d\w*)(?:\.\w+)*|\b\d+(?:[.,x]\d+)*\b")
_LISTED = re.compile(r"~(?:(?:, | and | or )~)+")


@dataclass(frozen=True)
class Outcome:
    """What became of one residual sum or merge; ``reason`` is countable, and empty where it was removed."""

    item: ResidualSum
    status: str  # removed, kept, refused, missing
    reason: str


@dataclass
class Recorded:
    """What happened while :func:`recording`.

    Attributes:
        outcomes: of all sums of all graphs that were planned to the end.
        doors: by which ways graphs came in, ``fx`` or ``export``.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    doors: set[str] = field(default_factory=set)

    def entered(self, report: Report) -> str:
        """How the network came in as a whole: ``fx``, ``export``, or ``partial``."""
        if report.left_out:
            return "partial"
        return "export" if "export" in self.doors else "fx"


@contextlib.contextmanager
def recording() -> Iterator[Recorded]:
    """Classify each graph at the moment in which rmfx takes stock of it: in normal form, before any pass.

    The table must speak of the graph that the report speaks of, under the same names, by whichever door it came; and
    where a network is converted in parts, of each part's graph and report.
    """
    recorded = Recorded()
    sums: dict[int, tuple[account.Before, list[ResidualSum]]] = {}  # holds each key's object, so that ids stay apart
    story = importlib.import_module("rmfx.prepare")
    originals = account.before, account.with_names, story.enter

    def before(model: nn.Module, gm: fx.GraphModule) -> account.Before:
        stock = originals[0](model, gm)
        sums[id(stock)] = stock, list(Census(gm).sums())
        return stock

    def with_names(report: Report, gm: fx.GraphModule, stock: account.Before) -> Report:
        named = originals[1](report, gm, stock)
        recorded.outcomes += outcomes(sums.pop(id(stock))[1], named)
        return named

    def enter(*args: Any, **kwargs: Any) -> Any:
        entered = originals[2](*args, **kwargs)
        recorded.doors.add("fx" if entered.symbolic else "export")
        return entered

    account.before, account.with_names, story.enter = before, with_names, enter
    try:
        yield recorded
    finally:
        account.before, account.with_names, story.enter = originals


def outcomes(sums: Iterable[ResidualSum], report: Report) -> list[Outcome]:
    """For each residual sum and merge of a graph, what the report on that graph says of it."""
    entries = {entry.node: entry for entry in report.entries}
    found = []
    for item in sums:
        entry = entries.get(item.node)
        if entry is None:
            found.append(Outcome(item, "missing", UNMENTIONED))
        else:
            found.append(Outcome(item, entry.status, countable(entry.reason or "")))
    return found


def countable(reason: str) -> str:
    """A reason without the names and numbers that differ from network to network.

    >>> countable("'mul_3' (in layer1.0.se) stands on a branch: a mul of 2 tensors, read by relu_1, add_2")
    '~ stands on a branch: a mul of ~ tensors, read by ~'
    """
    bare = _NUMBERED.sub("~", _QUOTED.sub("~", reason))
    return _LISTED.sub("~", bare)


def tally(found: Iterable[Outcome]) -> tuple[dict[str, dict[str, int]], list[tuple[str, str, int]]]:
    """Counts of statuses per class, and how often each (class, reason) occurs among those not removed."""
    counts: dict[str, Counter[str]] = {}
    reasons: Counter[tuple[str, str]] = Counter()
    for outcome in found:
        kind = outcome.item.kind
        counts.setdefault(kind, Counter())[outcome.status] += 1
        if outcome.status != "removed":
            reasons[kind, outcome.reason] += 1
    ordered = [(kind, reason, count) for (kind, reason), count in reasons.most_common()]
    return {kind: dict(counts[kind]) for kind in sorted(counts)}, ordered


def shapes(found: Iterable[Outcome]) -> list[tuple[str, str, str, str, int]]:
    """How often each (class, status, shortcut, branch) occurs."""
    counts = Counter((o.item.kind, o.status, o.item.shortcut, o.item.branch) for o in found)
    return [(*shape, count) for shape, count in counts.most_common()]
