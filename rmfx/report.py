"""What a conversion did, would do, or refused to do, as a value that prints and serialises."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import fx, nn

from rmfx.errors import RmfxError

Status = Literal["removed", "kept", "refused"]
META_KEY = "rmfx_report"  # where a converted GraphModule carries its report, see attach


@dataclass(frozen=True)
class Entry:
    """One residual sum of the user's model.

    MACs are multiply-accumulates of the region between fork and sum, for the example inputs, or
    ``None`` when none were given; parameters are counts of the same region.
    """

    place: str  # qualified name of the module whose forward holds the sum, "" for the root
    node: str  # name of the sum in the traced graph
    # "identity", "projection", "linear" (all branches linear), "nonlinear" (two such branches), "concat" (it is part of
    # one, and went with it), or "other" (refused before more was known)
    kind: str
    status: Status
    carrier: str | None = None  # "direct", "masked", "split", "shift", or several: "a+b"; None where nothing is carried
    reason: str | None = None  # why it was refused or kept
    macs_before: int | None = None
    macs_after: int | None = None
    params_before: int | None = None
    params_after: int | None = None
    size_conditions: tuple[str, ...] = ()
    carried_taps: tuple[tuple[str, tuple[int, ...]], ...] = ()  # (parameter, index) of some Dirac taps

    @property
    def name(self) -> str:
        """How the place is written in messages and accepted by ``policy=[...]``."""
        return self.place or self.node


@dataclass(frozen=True)
class PassLine:
    """What one pass applied and refused: ``refused`` are (place, reason) pairs."""

    name: str
    applied: int
    refused: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class LeftOut:
    """A module whose code no front door can follow, so that it was not looked into; its sub-modules may have been."""

    place: str  # qualified name of the module, "" for the whole model
    reason: str  # names file and line where they are known


@dataclass(frozen=True)
class Totals:
    """Whole-network counts; MACs are ``None`` when no example inputs were given."""

    params_before: int
    params_after: int
    macs_before: int | None = None
    macs_after: int | None = None


@dataclass(frozen=True)
class Report:
    """The account of one conversion, one :class:`Entry` per residual sum.

    ``str(report)`` is a table, ``report.to_dict()`` is JSON-able, ``Report.from_dict`` reads it back.

    Attributes:
        parameter_map: from every name in the original's ``state_dict`` to the tensors it went into.
        carried_norms: with ``keep_bn=True``, the carried channels of every widened batch norm.
        left_out: modules that could not be followed; empty where the model was converted as a whole.
        size_conditions: why the whole network holds for the example inputs' sizes only; entries have conditions, too.
        concat_conditions: sizes of images for which alone the concats that were removed are.
    """

    entries: tuple[Entry, ...]
    totals: Totals
    passes: tuple[PassLine, ...] = ()
    parameter_map: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    carried_norms: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    size_conditions: tuple[str, ...] = ()
    concat_conditions: tuple[str, ...] = ()

    @property
    def image_conditions(self) -> tuple[str, ...]:
        """Everything that is asked of the sizes of images: by sums and by concats that were removed."""
        of_sums = {condition for entry in self.entries for condition in entry.size_conditions}
        return tuple(sorted(of_sums | set(self.concat_conditions)))

    def count(self, status: Status) -> int:
        """How many residual sums ended in ``status``."""
        return sum(entry.status == status for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON-able dictionaries and lists."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Report:
        """Read back what :meth:`to_dict` wrote, also after a trip through JSON."""
        entries = [
            Entry(
                **{
                    **entry,
                    "size_conditions": tuple(entry["size_conditions"]),
                    "carried_taps": tuple((name, tuple(index)) for name, index in entry["carried_taps"]),
                }
            )
            for entry in data["entries"]
        ]
        passes = [
            PassLine(p["name"], p["applied"], tuple((place, reason) for place, reason in p["refused"]))
            for p in data["passes"]
        ]
        return Report(
            entries=tuple(entries),
            totals=Totals(**data["totals"]),
            passes=tuple(passes),
            parameter_map={old: tuple(new) for old, new in data["parameter_map"].items()},
            notes=tuple(data["notes"]),
            carried_norms={norm: tuple(channels) for norm, channels in data["carried_norms"].items()},
            left_out=tuple(LeftOut(part["place"], part["reason"]) for part in data.get("left_out", ())),
            size_conditions=tuple(data.get("size_conditions", ())),
            concat_conditions=tuple(data.get("concat_conditions", ())),
        )

    def __str__(self) -> str:
        header = ("place", "kind", "status", "carrier", "MACs before", "after", "params before", "after", "")
        rows = [
            (
                entry.name,
                entry.kind,
                entry.status,
                entry.carrier or "-",
                _count(entry.macs_before),
                _count(entry.macs_after),
                _count(entry.params_before),
                _count(entry.params_after),
                "; ".join(filter(None, (entry.reason, *entry.size_conditions))),
            )
            for entry in self.entries
        ]
        lines = _table(header, rows) if rows else ["no residual sums found"]
        lines += ["", self.summary()]
        lines += [f"{line.name}: {line.applied} applied, {len(line.refused)} refused" for line in self.passes]
        lines += self.left_out_lines()
        conditions = (*self.size_conditions, *self.concat_conditions)
        lines += [f"for the sizes of the example inputs only: {condition}" for condition in conditions]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def left_out_lines(self) -> list[str]:
        """One line for each module that could not be followed."""
        return [f"left out: {part.place or 'the model as a whole'}: {part.reason}" for part in self.left_out]

    def summary(self) -> str:
        """One sentence: sums removed, kept, refused, and what the whole network costs now."""
        totals = self.totals
        text = (
            f"{self.count('removed')} residual sums removed, {self.count('kept')} kept, "
            f"{self.count('refused')} refused; parameters {_growth(totals.params_before, totals.params_after)}"
        )
        if totals.macs_before is not None and totals.macs_after is not None:
            text += f", MACs {_growth(totals.macs_before, totals.macs_after)}"
        return text


def attach(converted: nn.Module, report: Report) -> None:
    """Let ``converted`` carry ``report``: ``meta`` survives ``copy.deepcopy``, the attribute survives pickling."""
    if isinstance(converted, fx.GraphModule):
        converted.meta[META_KEY] = report
    converted.__dict__[META_KEY] = report


def attached(module: nn.Module) -> Report | None:
    """The report that ``module`` carries, if it does."""
    meta = module.meta if isinstance(module, fx.GraphModule) else {}
    found = meta.get(META_KEY) or module.__dict__.get(META_KEY)
    return found if isinstance(found, Report) else None


def report(converted: nn.Module) -> Report:
    """The :class:`Report` that ``rmfx.convert`` left in ``converted``.

    Raises:
        RmfxError: when ``converted`` does not come from ``rmfx.convert`` or ``rmfx.load``.
    """
    found = attached(converted)
    if found is None:
        raise RmfxError(
            f"{type(converted).__name__} carries no rmfx report: pass the module that rmfx.convert or "
            "rmfx.load returned"
        )
    return found


def _count(number: int | None) -> str:
    if number is None:
        return "-"
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _growth(before: int, after: int) -> str:
    ratio = f" ({after / before:.2f}x)" if before else ""
    return f"{_count(before)} -> {_count(after)}{ratio}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    ruler = tuple("-" * width for width in widths)
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (header, ruler, *rows)]
