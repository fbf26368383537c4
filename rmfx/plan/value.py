"""A plan: what is decided for every place of a network, as a value that prints, is saved, and is followed again."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rmfx.errors import PlanError
from rmfx.files.atomic import replacing
from rmfx.measure.target import Target

VERSION = 1
_NUMBER = (int, float, type(None))
_CHOICE = {
    **{"rule": str, "node": str, "place": str, "applied": bool, "variant": Mapping},
    **{"before_ms": _NUMBER, "after_ms": _NUMBER, "measured": bool},
}
_PLAN = {"channels_last": bool, "in_place": bool, "original": bool}


def _typed(values: Mapping[str, Any], types: Mapping[str, Any]) -> Mapping[str, Any]:
    """``values``, of the ``types`` that their names stand for.

    Raises:
        TypeError: when one is not.
    """
    for name, value in values.items():
        if name in types and not isinstance(value, types[name]):
            raise TypeError(f"{name} is {value!r}")
    return values


@dataclass(frozen=True)
class Choice:
    """What is decided for one place.

    Attributes:
        rule: the pass that may rewrite the place.
        node: the node at which it matches, by its name in the traced model.
        place: the module whose ``forward`` holds that node.
        applied: whether the place is rewritten.
        variant: options of the pass that are not its defaults.
        before_ms, after_ms: prices of the place as it was and rewritten, on the plan's target.
        measured: whether the prices were measured there; else they are estimates from shapes.
    """

    rule: str
    node: str
    place: str
    applied: bool
    variant: Mapping[str, Any] = field(default_factory=dict)
    before_ms: float | None = None
    after_ms: float | None = None
    measured: bool = False

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.variant.items())
        price = ""
        if self.before_ms is not None and self.after_ms is not None:
            price = f"  {self.before_ms:.3f} -> {self.after_ms:.3f} ms{'' if self.measured else ' (estimated)'}"
        done = "apply" if self.applied else "keep "
        return f"{done} {self.rule}{f'({options})' if options else ''} at {self.place or '-'}:{self.node}{price}"


@dataclass(frozen=True)
class Plan:
    """All decisions for one architecture on one target. Weights are not in it.

    Attributes:
        target: where the network is to run.
        shapes: of the example inputs that prices are for.
        choices: one for each place where a pass could have done something.
        channels_last: whether images are laid out with channels last, for runtimes that do not choose that themselves.
        in_place: whether activations and sums write over what nothing else reads.
        original: whether nothing at all is rewritten, as no rewriting was faster.
        notes: what was measured on whole networks.

    >>> plan = Plan(Target("eager"), ((1, 3, 8, 8),), (Choice("remove_residual", "add", "", False),))
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    target: Target
    shapes: tuple[tuple[int, ...], ...] = ()
    choices: tuple[Choice, ...] = ()
    channels_last: bool = False
    in_place: bool = False
    original: bool = False
    notes: tuple[str, ...] = ()

    def count(self, rule: str) -> int:
        """How many places a pass rewrites."""
        return sum(choice.applied for choice in self.choices if choice.rule == rule)

    def __str__(self) -> str:
        lines = [f"plan for {self.target}, inputs {', '.join('x'.join(map(str, shape)) for shape in self.shapes)}"]
        if self.original:
            lines.append("nothing is rewritten: nothing was faster than the network as it is")
        lines += [str(choice) for choice in self.choices]
        lines += [f"channels last: {self.channels_last}, in place: {self.in_place}"]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The whole plan as JSON text."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read back what :meth:`to_json` wrote.

        Raises:
            PlanError: when ``text`` is no plan, or one of another version.
        """
        try:
            data = json.loads(text)
            if data.pop("version") != VERSION:
                raise PlanError(f"the plan is of another version than {VERSION}: plan again")
            return Plan(
                **{
                    **data,
                    "target": Target(**data["target"]),
                    "shapes": tuple(tuple(map(operator.index, shape)) for shape in data["shapes"]),
                    "choices": tuple(Choice(**_typed(choice, _CHOICE)) for choice in data["choices"]),
                    "notes": tuple(map(str, data["notes"])),
                    **_typed({name: data[name] for name in _PLAN}, _PLAN),
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise PlanError(f"this is no plan of rmfx ({problem!r})") from problem

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan to a file, whole or not at all.

        Raises:
            PlanError: when ``path`` cannot be written.
        """
        with replacing(path, PlanError) as scratch:
            scratch.write_text(self.to_json(), encoding="utf-8")
        return Path(path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a file of :meth:`save`.

        Raises:
            PlanError: when the file cannot be read, or holds no plan.
        """
        try:
            return Plan.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as problem:
            raise PlanError(f"cannot read the plan {os.fspath(path)}: {problem}") from problem
