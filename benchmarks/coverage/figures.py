"""The figures that coverage must reach, computed from the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from benchmarks.coverage.classes import CLASSES, MERGE
from benchmarks.coverage.row import NOISE_FACTOR, TOLERANCE
from benchmarks.coverage.store import Row
from benchmarks.coverage.sums import UNMENTIONED

EXECUTED = ("right", "wrong")
FAILED = ("crashed", "timeout")
EASY = "ABCDEFG"


@dataclass(frozen=True)
class Figure:
    """A share or a count with the bound it must keep; ``at_least`` or else at most."""

    name: str
    value: float
    bound: float
    at_least: bool
    share: bool

    @property
    def reached(self) -> bool:
        """Whether the bound is kept; a NaN is a miss."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def shown(self, number: float) -> str:
        """A number of this figure as it is printed."""
        return f"{100 * number:.2f} %" if self.share else f"{number:g}"


def figures(rows: Mapping[str, Row], names: Iterable[str]) -> list[Figure]:
    """All figures over the networks ``names``; one without a row counts as neither run nor entered.

    Only in a network that was run and found right does a removed sum count as removed.
    """
    known = list(names)
    present = [rows[name] for name in known if name in rows]
    statuses = Counter(row["status"] for row in present)
    total = max(1, len(known))
    entered = sum(row.get("entered", "none") != "none" for row in present)
    vision = [row for row in present if row["source"] == "torchvision"]
    far = [row for row in present if row["status"] in EXECUTED and not _within_noise(row)]
    return [
        _share("networks executed and compared in float64", sum(statuses[s] for s in EXECUTED) / total, 0.95),
        Figure("networks that end in a wrong result", statuses["wrong"], 0, False, False),
        Figure("networks that crash", sum(statuses[s] for s in FAILED), 0, False, False),
        _share("networks that enter by some front door", entered / total, 0.99),
        _share("sums of classes A to G removed exactly", removed_share(present, EASY), 0.98),
        _share("the same in torchvision", removed_share(vision, EASY), 1.0),
        _share("sums of class J removed exactly", removed_share(present, "J"), 0.60),
        _share("remaining sums with a specific reason", reasoned_share(present), 1.0),
        Figure("executed networks further off than 1e-11 and 100x noise", len(far), 0, False, False),
    ]


def _share(name: str, value: float, bound: float) -> Figure:
    return Figure(name, value, bound, at_least=True, share=True)


def _within_noise(row: Row) -> bool:
    return row["difference"] <= max(TOLERANCE, NOISE_FACTOR * (row["noise"] or 0))


def count(rows: Iterable[Row], classes: str = CLASSES) -> Counter[str]:
    """Sums of ``classes`` by what became of them; ``removed`` only where the result was right, else ``planned``."""
    found: Counter[str] = Counter()
    for row in rows:
        for kind, statuses in row.get("sums", {}).items():
            if kind in classes:
                for status, number in statuses.items():
                    proven = status != "removed" or row["status"] == "right"
                    found[status if proven else "planned"] += number
    return found


def removed_share(rows: Iterable[Row], classes: str) -> float:
    """Which share of the sums of ``classes`` is removed; NaN where there are none."""
    found = count(rows, classes)
    return found["removed"] / found.total() if found.total() else float("nan")


def reasoned_share(rows: Iterable[Row]) -> float:
    """Which share of the sums that stay has an entry with a reason; NaN where none stays."""
    stay = reasoned = 0
    for row in rows:
        for kind, reason, number in row.get("reasons", ()):
            if kind != MERGE:
                stay += number
                reasoned += number * bool(reason and reason != UNMENTIONED)
    return reasoned / stay if stay else float("nan")
