"""What a conversion can be told, checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from rmfx.algebra.carrier import CHOICES, SHIFT_BITS
from rmfx.errors import RmfxError
from rmfx.measure.target import Target
from rmfx.plan.value import Plan
from rmfx.report import Entry

Policy = str | Plan | Callable[[Entry], bool] | Collection[str]
_DOWNSAMPLE = ("cheaper", "conv", "input")
_FUSE = ("cheaper", "always", "never")
_SECONDS = 60.0  # measure=True


@dataclass(frozen=True)
class Options:
    """How to convert; the fields are the keyword arguments of :func:`convert`."""

    policy: Policy = "all"
    carrier: str = "auto"
    downsample: str = "cheaper"
    fuse: str = "cheaper"
    max_growth: float | None = None
    keep_bn: bool = False
    concat: bool = False
    drop_dead_channels: bool = False
    shift_bits: float = SHIFT_BITS
    value_ranges: Mapping[str, Any] = field(default_factory=dict)
    target: Target = Target()
    measure: bool | float = True

    @property
    def seconds(self) -> float:
        """Time that measuring places may take."""
        return _SECONDS * self.measure if isinstance(self.measure, bool) else float(self.measure)

    def __post_init__(self) -> None:
        _require_one_of("carrier", self.carrier, CHOICES)
        _require_one_of("downsample", self.downsample, _DOWNSAMPLE)
        _require_one_of("fuse", self.fuse, _FUSE)
        if not (isinstance(self.shift_bits, (int, float)) and self.shift_bits >= 0):
            raise RmfxError(f"shift_bits must be a number of bits, at least 0, got {self.shift_bits!r}")
        if isinstance(self.policy, str):
            _require_one_of("policy", self.policy, ("all", "auto"), " (or a plan, a callable, or a list of places)")
        elif not callable(self.policy) and not isinstance(self.policy, Collection | Plan):
            raise RmfxError(
                f"policy must be 'all', 'auto', a plan, a callable, or a list of places, got {self.policy!r}"
            )
        if self.policy == "auto" or isinstance(self.policy, Plan):
            self._check_planned()
        if not isinstance(self.measure, bool) and not (isinstance(self.measure, (int, float)) and self.measure >= 0):
            raise RmfxError(f"measure must be True, False or a number of seconds, got {self.measure!r}")
        if self.max_growth is not None and not (isinstance(self.max_growth, (int, float)) and self.max_growth > 0):
            raise RmfxError(f"max_growth must be a positive factor, got {self.max_growth!r}")

    def _check_planned(self) -> None:
        if self.keep_bn:
            raise RmfxError("keep_bn=True is for training; a plan is for running: choose one")
        if self.fuse != "cheaper" or self.max_growth is not None or self.drop_dead_channels:
            raise RmfxError("fuse, max_growth and drop_dead_channels have no say where a plan decides: leave them out")


def _require_one_of(option: str, value: str, choices: tuple[str, ...], more: str = "") -> None:
    if value not in choices:
        raise RmfxError(f"{option} must be one of {', '.join(map(repr, choices))}{more}, got {value!r}")
