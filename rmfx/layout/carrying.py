"""How a value is held in the stack while nonlinear steps act on its neighbours: the carriers, as encodings.

* *plain*: as it is, where every activation is the identity on it (direct) or is kept off it (masked);
* *split*: as ``[u; -u]``; behind an activation ``u`` is ``(phi(u) - phi(-u)) / k``. Only ReLU leaves a pair that passes
  again as it is, the others are recombined at the next linear step;
* *shifted*: as ``s*u + b`` inside the range on which the activations are the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from rmfx.algebra.carrier import Carrier, choose_carrier, shift_plan
from rmfx.algebra.pointwise import NORMS, Range, image, is_identity_on, is_per_channel, split_constant, split_is_stable
from rmfx.layout.problem import Value, Wish

Scale = tuple[float, float]  # factor and constant


@dataclass(frozen=True)
class Encoding:
    """How segments hold a value ``u``.

    Attributes:
        copies: segment ``i`` was made as ``copies[i][0] * u + copies[i][1]``.
        decoding: ``u`` is the sum of ``decoding[i][0] * segment + decoding[i][1]``.
        stable: whether the segments may be carried on as they are over a linear step.
        carrier: what it is called.
        range: holds every element of every segment; ``None``: the range of the value.
    """

    copies: tuple[Scale, ...] = ((1.0, 0.0),)
    decoding: tuple[Scale, ...] = ((1.0, 0.0),)
    stable: bool = True
    carrier: Carrier | None = None
    range: Range | None = None


PLAIN = Encoding()


@dataclass(frozen=True)
class Passage:
    """A segment's way through a pointwise step: its activation (``None``: it is kept off), and what it is behind."""

    layer: nn.Module | None
    after: Encoding
    carrier: Carrier | None


def encoding_for(acting: Sequence[nn.Module], value: Value, wish: Wish) -> Encoding:
    """The encoding in which a value passes the activations ``acting``, one after another.

    Raises:
        InexactError: when the wanted carrier is not exact here.
    """
    values = value.range
    for activation in acting:
        if isinstance(activation, NORMS) or is_identity_on(activation, values):
            continue
        carrier = choose_carrier(activation, values, wish.carrier, rms=value.rms, max_bits=wish.shift_bits)
        if carrier == "split":
            reach = max(abs(values[0]), abs(values[1]))
            return Encoding(((1.0, 0.0), (-1.0, 0.0)), ((1.0, 0.0), (0.0, 0.0)), True, "split", (-reach, reach))
        if carrier == "shift":
            return _shifted(activation, values)
        return PLAIN
    return PLAIN


def _shifted(activation: nn.Module, values: Range) -> Encoding:
    plan = shift_plan(activation, values)
    assert plan is not None  # choose_carrier has made sure of it
    scale, offset = plan.scale, plan.offset
    low, high = (scale * end + offset for end in values)
    return Encoding(((scale, offset),), ((1.0 / scale, -offset / scale),), True, "shift", (low, high))


def carried_through(acting: Sequence[nn.Module], held: Encoding, values: Range, wanted: str) -> Passage:
    """How segments that hold a value of range ``values`` pass a pointwise step of the activations ``acting``.

    Raises:
        InexactError: when the wanted carrier is not exact here.
    """
    if all(isinstance(activation, NORMS) for activation in acting):
        return Passage(None, held, None)  # a widened norm is the identity on what it carries
    span = held.range or values
    waits = held.carrier == "split" and not held.decoding[1][0]  # a pair that no activation has acted on yet
    if waits and len(acting) == 1 and (k := split_constant(acting[0])) is not None:
        reach = image(acting[0], span)
        stable = split_is_stable(acting[0])
        decoding = ((1.0 / k, 0.0), (-1.0 / k, 0.0))
        return Passage(acting[0], replace(held, decoding=decoding, stable=stable, range=reach), "split")
    wanted = wanted if held.carrier is None else "auto"
    chosen = {choose_carrier(activation, span, wanted) for activation in acting}
    if chosen == {"direct"}:
        return Passage(None if is_per_channel(acting[0]) else acting[0], held, held.carrier or "direct")
    return Passage(None, held, "masked")
