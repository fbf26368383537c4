"""How a tensor is carried through a nonlinearity that is meant for its neighbours (the paper's section 3.1).

* **direct**: the activation is the identity on the carried values (ReLU on what a ReLU has made);
* **masked**: the layer applies the activation to some channels and passes the others (PReLU, clamp, ``where``);
* **split**: carry ``[u; -u]`` through an activation with ``phi(t) - phi(-t) = k*t``, recombine with ``[I, -I] / k``;
* **shift**: carry ``s*u + beta``, which lies where the activation is the identity, and undo both at the merge. In
  floating point ``beta`` takes up digits that ``u`` then lacks: a shift that costs more than 2 bits is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from rmfx.algebra.pointwise import Range, identity_range, is_identity_on, split_constant
from rmfx.errors import InexactError

Carrier = Literal["direct", "masked", "split", "shift"]
CHOICES = ("auto", "direct", "masked", "split", "shift")
SHIFT_BITS = 2.0  # what a shift may cost: a quarter of the precision is left, an error ratio of 4


@dataclass(frozen=True)
class ShiftPlan:
    """Carry ``scale * u + offset``; ``scale`` is a power of two, so it costs no precision."""

    scale: float
    offset: float

    def bits(self, rms: float) -> float:
        """Bits of precision that values of root mean square ``rms`` lose beside the offset; none below 0.

        >>> ShiftPlan(1.0, 8.0).bits(rms=2.0)
        2.0
        """
        if not self.offset:
            return 0.0
        return max(0.0, math.log2(abs(self.offset) / (self.scale * rms))) if rms > 0 else math.inf


def shift_plan(activation: nn.Module, values: Range) -> ShiftPlan | None:
    """The least shift of ``values`` to where ``activation`` is the identity, or ``None`` where there is none.

    An end of ``values`` must be finite where the identity range has a finite end on that side. Where that range has
    two, ``u`` is scaled down by a power of two until it fits.

    >>> shift_plan(nn.ReLU(), (-3.0, 5.0)), shift_plan(nn.ReLU6(), (-3.0, 20.0))
    (ShiftPlan(scale=1.0, offset=3.0), ShiftPlan(scale=0.25, offset=0.75))
    >>> shift_plan(nn.ReLU(), (-math.inf, 5.0)) is None
    True
    """
    inside = identity_range(activation)
    if inside is None or inside[0] > inside[1]:
        return None
    low, high = values
    if math.isfinite(inside[0]) > math.isfinite(low) or math.isfinite(inside[1]) > math.isfinite(high):
        return None
    scale = _scale(inside[1] - inside[0], high - low)
    if scale is None:
        return None
    least = inside[0] - scale * low if math.isfinite(inside[0]) else -math.inf
    most = inside[1] - scale * high if math.isfinite(inside[1]) else math.inf
    return ShiftPlan(scale, 0.0 if least <= 0.0 <= most else least if least > 0.0 else most)


def _scale(room: float, width: float) -> float | None:
    """The largest power of two up to 1 by which ``width`` fits into ``room``."""
    if width <= room:
        return 1.0
    if room / width < 2.0**-100:  # nothing would be left of it in float32
        return None
    scale = 2.0 ** math.floor(math.log2(room / width))
    return scale if scale * width <= room else scale / 2


def choose_carrier(
    activation: nn.Module, values: Range, wanted: str, *, rms: float | None = None, max_bits: float = SHIFT_BITS
) -> Carrier:
    """The carrier of ``values`` through ``activation``; direct wherever that is exact, else what is ``wanted``.

    Args:
        activation: of the pointwise step.
        values: an interval that holds all carried values.
        wanted: one of :data:`CHOICES`; ``auto`` is masked where direct is not exact.
        rms: root mean square of the carried values, where anything tells (:class:`rmfx.algebra.bounds.Bounds`);
            by default that of values spread evenly over the interval.
        max_bits: what a shift may cost; ``math.inf`` forces it.

    Raises:
        InexactError: when the wanted carrier is not exact here, or a shift costs too much.

    >>> choose_carrier(nn.ReLU(), (0.0, 6.0), "auto"), choose_carrier(nn.ReLU(), (-1.0, 1.0), "auto")
    ('direct', 'masked')
    """
    if is_identity_on(activation, values):
        return "direct"
    name = type(activation).__name__
    low, high = values
    if wanted == "direct":
        raise InexactError(f"carrier 'direct' needs {name} to be the identity on [{low:g}, {high:g}], which it is not")
    if wanted == "split":
        if split_constant(activation) is None:
            raise InexactError(f"carrier 'split' needs phi(t) - phi(-t) = k*t, which {name} does not satisfy")
        return "split"
    if wanted == "shift":
        _check_shift(activation, values, even_rms(values) if rms is None else rms, max_bits)
        return "shift"
    return "masked"


def _check_shift(activation: nn.Module, values: Range, rms: float, max_bits: float) -> None:
    name = type(activation).__name__
    if identity_range(activation) is None:
        raise InexactError(f"carrier 'shift' needs an activation that is the identity somewhere, which {name} is not")
    plan = shift_plan(activation, values)
    if plan is None:
        low, high = values
        raise InexactError(
            f"carrier 'shift' needs bounds of what it carries through {name}, known is only [{low:g}, {high:g}]: "
            "pass value_ranges (rmfx.bounds_from_data measures some)"
        )
    bits = plan.bits(rms)
    if bits > max_bits:
        raise InexactError(
            f"carrier 'shift' would cost {bits:.1f} bits of precision: it adds {plan.offset:.3g} to values of about "
            f"{plan.scale * rms:.3g}"
        )


def even_rms(values: Range) -> float:
    """Root mean square of values spread evenly over an interval; an end that is unknown mirrors the other.

    >>> even_rms((-3.0, math.inf)), even_rms((2.0, 2.0))
    (1.7320508075688772, 2.0)
    """
    low, high = values
    low, high = (low if math.isfinite(low) else -abs(high)), (high if math.isfinite(high) else abs(low))
    reach = max(abs(low), abs(high)) or 1.0
    low, high = low / reach, high / reach
    return reach * math.sqrt((low * low + low * high + high * high) / 3)
