"""What the graph tells of each value before anything is run: tensor or number, rank, floats, sizes that never change.

A size is *fixed* where the code or the weights of the network set it: channels of a convolution, features of a linear
layer, literal numbers of a reshape. Batch sizes and sizes of images are not, even where example inputs show them, so
that what is concluded from fixed sizes holds for every input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

Sizes = tuple[int | None, ...]


@dataclass(frozen=True)
class Kind:
    """What is surely known of one value.

    Attributes:
        tensor: false when it is surely no tensor.
        rank: number of dimensions, where known.
        floating: true when it surely holds real floats.
        sizes: of a tensor of known rank, the fixed sizes; ``None`` for those that depend on the input.
        value: of a number its value, of several numbers a tuple of them (``None`` where one depends on the input), of
            the parts of a tensor the kind of each.
    """

    tensor: bool = True
    rank: int | None = None
    floating: bool = False
    sizes: Sizes = ()
    value: Any = None

    def __post_init__(self) -> None:
        if self.rank is not None and len(self.sizes) != self.rank:
            object.__setattr__(self, "sizes", (None,) * self.rank)

    @property
    def channels(self) -> int | None:
        """Size of dimension 1, where fixed."""
        return self.sizes[1] if len(self.sizes) > 1 else None

    def with_size(self, axis: int, size: int | None) -> Kind:
        """The same tensor with another size along ``axis``."""
        axis %= len(self.sizes)
        return replace(self, sizes=(*self.sizes[:axis], size, *self.sizes[axis + 1 :]), value=None)


ANY = Kind()
Kinds = dict[fx.Node, Kind]


def numel(sizes: Sizes) -> int | None:
    """Product of sizes; ``None`` where one is not fixed."""
    total = 1
    for size in sizes:
        if size is None:
            return None
        total *= size
    return total


def broadcast(kinds: list[Kind]) -> Kind:
    """The kind of an elementwise operation on several tensors."""
    ranks = [kind.rank for kind in kinds]
    floating = any(kind.floating for kind in kinds)
    rank = max((rank for rank in ranks if rank is not None), default=None)
    if None in ranks or rank is None:
        return Kind(True, None, floating)
    columns = zip(*((1,) * (rank - len(kind.sizes)) + kind.sizes for kind in kinds), strict=True)
    return Kind(True, rank, floating, tuple(_broadcast_size(column) for column in columns))


def _broadcast_size(sizes: tuple[int | None, ...]) -> int | None:
    large = [size for size in sizes if size is not None and size != 1]
    if large:
        return large[0]  # what is not fixed here is 1 or the same
    return None if None in sizes else 1


def flattened(source: Kind, first: int, last: int) -> Kind:
    """The kind of ``x.flatten(first, last)``."""
    if not source.rank:
        return Kind(True, None, source.floating)
    first, last = first % source.rank, last % source.rank
    middle = numel(source.sizes[first : last + 1])
    sizes = (*source.sizes[:first], middle, *source.sizes[last + 1 :])
    return Kind(True, len(sizes), source.floating, sizes)
