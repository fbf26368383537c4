"""The vocabulary of layouts: what a region asks for, and what laying it out gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from rmfx.algebra.affine import Affine
from rmfx.algebra.carrier import Carrier
from rmfx.algebra.pointwise import Range


@dataclass(frozen=True)
class Value:
    """A tensor on a chain: how many channels it has, in what range, of which spatial sizes (if known)."""

    channels: int
    range: Range
    sizes: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a chain: a linear map or an activation, under the name of the user's module, and its value."""

    name: str
    map: Affine | nn.Module
    value: Value


@dataclass(frozen=True, eq=False)
class Problem:
    """A region to lay out.

    Attributes:
        fork: the value both chains start from.
        chains: the layers of the branch and of the shortcut, from fork to sum.
        dims: spatial dimensions of the linear maps.
        carrier, downsample: the user's wishes (:func:`rmfx.convert`).
        channel_axis: axis of the channels, for activations with one parameter per channel.
    """

    fork: Value
    chains: tuple[tuple[Layer, ...], tuple[Layer, ...]]
    dims: int
    carrier: str = "auto"
    downsample: str = "cheaper"
    channel_axis: int = 1

    def value(self, side: int, done: int) -> Value:
        """The value of a chain after its first ``done`` layers."""
        return self.chains[side][done - 1].value if done else self.fork


@dataclass(frozen=True, eq=False)
class NewLayer:
    """A layer of the solution, and the user's name it takes over (``None``: it needs a new one)."""

    map: Affine | nn.Module
    name: str | None


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

    layers: tuple[NewLayer, ...]
    macs: float
    carriers: frozenset[Carrier]
    carried: tuple[tuple[int, tuple[int, ...]], ...]
    sized: bool
