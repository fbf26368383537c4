"""The vocabulary of layouts: what a region asks for, and what laying it out gives."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from rmfx.algebra.affine import Affine
from rmfx.algebra.carrier import SHIFT_BITS, Carrier
from rmfx.algebra.pointwise import Range

# linear: a sum of maps of earlier values; sum: the same with identities, which no layer of the user's is needed for;
# pointwise: an activation; gate: a product with a tensor computed aside; stage: a pool or the like, alike per channel.
Kind = Literal["linear", "sum", "pointwise", "gate", "stage"]


@dataclass(frozen=True)
class Value:
    """Some channels of a tensor: how many, in what range, of which spatial sizes and typical size (if known)."""

    channels: int
    range: Range
    sizes: tuple[int, ...] | None
    rms: float | None = None


@dataclass(frozen=True)
class Gate:
    """What multiplies a tensor: computed beside the stack from values that must be in it.

    Attributes:
        key: names the gate for whoever emits it.
        reads: each tensor that it is computed from, as values side by side.
        behind: the indices of those that are read through a layer of the user's, which pads or scales and stays.
        channels: of the factor: as many as the product, or 1.
        start: which channel of the product the op at hand begins with.
    """

    key: Hashable
    reads: tuple[tuple[int, ...], ...]
    channels: int
    start: int = 0
    behind: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Op:
    """One operation of a region, on some channels of its tensors.

    Attributes:
        unit: ops of one unit are one operation of the network, and advance together.
        name: of the user's layer.
        inputs: the values it reads; of a linear op, one per map.
        maps: of a linear op or a sum: its value is the sum of ``maps[i](inputs[i])``.
        layer: of a pointwise op or a stage.
        gate: of a gate.
        value: what it makes.
    """

    kind: Kind
    unit: int
    name: str
    inputs: tuple[int, ...]
    value: Value
    maps: tuple[Affine, ...] = ()
    layer: nn.Module | None = None
    gate: Gate | None = None

    @property
    def reads(self) -> tuple[int, ...]:
        """All values it depends on."""
        return self.inputs + (tuple(v for read in self.gate.reads for v in read) if self.gate else ())


@dataclass(frozen=True)
class Wish:
    """How to carry.

    Attributes:
        carrier: by name (:data:`rmfx.algebra.carrier.CHOICES`).
        shift_bits: that a shift may cost.
        dense: whether convolutions that carry something stay ungrouped.
    """

    carrier: str = "auto"
    shift_bits: float = SHIFT_BITS
    dense: bool = False


@dataclass(frozen=True, eq=False)
class Problem:
    """A region to lay out. Values are numbered: first the parts of the fork, then one per op.

    Attributes:
        fork: the parts of the tensor that everything starts from, side by side.
        ops: in an order in which each reads earlier values only.
        join: the values that make up the result, side by side.
        dims: spatial dimensions of the linear maps.
        carrier, downsample: the user's wishes (:func:`rmfx.convert`).
        channel_axis: axis of the channels, for activations with one parameter per channel.
    """

    fork: tuple[Value, ...]
    ops: tuple[Op, ...]
    join: tuple[int, ...]
    dims: int
    carrier: Wish = Wish()
    downsample: str = "cheaper"
    channel_axis: int = 1

    def op(self, value: int) -> Op | None:
        """The op that makes a value; ``None`` for a part of the fork."""
        return None if value < len(self.fork) else self.ops[value - len(self.fork)]

    def value(self, number: int) -> Value:
        """A value by its number."""
        return self.fork[number] if number < len(self.fork) else self.ops[number - len(self.fork)].value

    def numbered(self) -> Sequence[tuple[int, Op]]:
        """Every op with the number of its value."""
        return list(enumerate(self.ops, start=len(self.fork)))


@dataclass(frozen=True, eq=False)
class NewLayer:
    """A layer of the solution, and the user's name it takes over (``None``: it needs a new one)."""

    map: Affine | nn.Module
    name: str | None


@dataclass(frozen=True, eq=False)
class NewGate:
    """A product with the stack.

    Attributes:
        key: which gate (:attr:`Gate.key`).
        reads: maps from the stack to each tensor that the gate is computed from.
        active: for each channel of the stack, the channel of the factor it is multiplied by; -1 where it is carried.
        channels: of the factor.
        picks: for each read, whether it is nothing but channels of the stack, in some order.
        behind: for each read, whether a layer of the user's stays between it and the stack.
    """

    key: Hashable
    reads: tuple[Affine, ...]
    active: tuple[int, ...]
    channels: int
    picks: tuple[bool, ...]
    behind: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class Solution:
    """A region laid out as a plain sequence.

    Attributes:
        layers: the new layers, in order.
        macs: multiply-accumulates per sample (per fork position where sizes are unknown).
        carriers: the carriers used, empty where nothing passes a nonlinearity beside another tensor.
        carried: index into ``layers`` and weight indices of some Dirac taps.
        sized: whether exactness was shown for the example inputs' sizes only.
    """

    layers: tuple[NewLayer | NewGate, ...]
    macs: float
    carriers: frozenset[Carrier]
    carried: tuple[tuple[int, tuple[int, ...]], ...]
    sized: bool
