"""Tap grids: which input positions a convolution reads, on any number of spatial axes (0 to 3).

Output position ``i`` of an axis reads input positions ``s*i + o`` for the *offsets*
``o = j*d - before``, ``j = 0 .. k-1``. Two convolutions agree tap by tap when their offsets do,
whatever their kernel sizes, so everything here compares offsets, never kernel sizes.

The output size is ``floor((n + e - 1) / s) + 1`` with the *excess* ``e = before + after - d*(k-1)``:
0 for every "same" convolution, negative where the borders are cropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod

from rmfx.errors import InexactError


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a tap grid: ``kernel`` taps, ``stride``, ``dilation``, zeros around."""

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    before: int = 0
    after: int = 0

    @property
    def first(self) -> int:
        """Offset of the first tap."""
        return -self.before

    @property
    def last(self) -> int:
        """Offset of the last tap."""
        return (self.kernel - 1) * self.dilation - self.before

    @property
    def excess(self) -> int:
        """``e`` in the output size ``floor((n + e - 1) / s) + 1``."""
        return self.before + self.after - self.dilation * (self.kernel - 1)

    @property
    def samples(self) -> bool:
        """Whether the axis only picks ``x[s*i]``."""
        return self.kernel == 1 and self.before == 0 and self.after == 0

    def out_size(self, size: int) -> int:
        """Number of output positions for ``size`` input positions."""
        return (size + self.excess - 1) // self.stride + 1


@dataclass(frozen=True)
class Grid:
    """The taps of a convolution on all its axes, and how it pads.

    >>> grid = Grid.of(kernel=(3, 3), stride=(2, 2), padding=(1, 1))
    >>> grid.out_size((15, 16)), grid.samples
    ((8, 8), False)
    """

    axes: tuple[Axis, ...] = ()
    mode: str = "zeros"

    @staticmethod
    def of(
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
        padding: Sequence[int] | None = None,
        dilation: Sequence[int] | None = None,
        mode: str = "zeros",
    ) -> Grid:
        """A grid with symmetric padding, from the arguments of a ``torch.nn`` convolution."""
        ones, zeros = [1] * len(kernel), [0] * len(kernel)
        axes = zip(kernel, stride or ones, dilation or ones, padding or zeros, strict=True)
        return Grid(tuple(Axis(k, s, d, p, p) for k, s, d, p in axes), mode)

    @staticmethod
    def sampling(stride: Sequence[int]) -> Grid:
        """The grid of a strided identity: one tap, at offset 0."""
        return Grid(tuple(Axis(stride=s) for s in stride))

    @property
    def dims(self) -> int:
        """Number of spatial axes."""
        return len(self.axes)

    @property
    def kernel(self) -> tuple[int, ...]:
        """Taps per axis."""
        return tuple(axis.kernel for axis in self.axes)

    @property
    def stride(self) -> tuple[int, ...]:
        """Stride per axis."""
        return tuple(axis.stride for axis in self.axes)

    @property
    def dilation(self) -> tuple[int, ...]:
        """Dilation per axis."""
        return tuple(axis.dilation for axis in self.axes)

    @property
    def taps(self) -> int:
        """Taps over all axes."""
        return prod(self.kernel)

    @property
    def samples(self) -> bool:
        """Whether the grid reads one input position per output position, at offset 0."""
        return all(axis.samples for axis in self.axes)

    @property
    def padded(self) -> bool:
        """Whether any tap can read padding."""
        return any(max(axis.before, axis.after) > 0 for axis in self.axes)

    @property
    def is_same(self) -> bool:
        """Whether this is the padding that ``padding="same"`` stands for."""
        return all(a.excess == 0 and a.stride == 1 and a.before == (a.before + a.after) // 2 for a in self.axes)

    @property
    def symmetric(self) -> bool:
        """Whether both sides of every axis are padded alike."""
        return all(axis.before == axis.after for axis in self.axes)

    @property
    def excess(self) -> tuple[int, ...]:
        """Excess per axis; all 0 where sizes are those of strided sampling."""
        return tuple(axis.excess for axis in self.axes)

    def out_size(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Spatial output sizes for spatial input ``sizes``."""
        return tuple(axis.out_size(size) for axis, size in zip(self.axes, sizes, strict=True))


@dataclass(frozen=True)
class Embedding:
    """Where the taps of a small kernel lie in a larger one: tap ``j`` at ``start + j*step``, per axis."""

    start: tuple[int, ...]
    step: tuple[int, ...]

    def slices(self, kernel: Sequence[int]) -> tuple[slice, ...]:
        """Index of the small kernel's taps in the large kernel, one slice per axis."""
        spans = zip(self.start, self.step, kernel, strict=True)
        return tuple(slice(start, start + (k - 1) * step + 1, step) for start, step, k in spans)


def align(grids: Sequence[Grid], symmetric: bool = False) -> tuple[Grid, tuple[Embedding, ...]]:
    """The smallest grid that holds all taps of ``grids``, and where each lies in it.

    The output size is that of ``grids[0]``; callers make sure that the others have the same.

    Args:
        symmetric: let both sides be padded alike, as those of other modes than zeros always are.

    Raises:
        InexactError: on different strides, or on padding modes that cannot be shared.
    """
    if len({grid.dims for grid in grids}) > 1:
        raise InexactError("maps of different spatial dimensions do not share a grid")
    mode = _common_mode(grids)
    columns = list(zip(*(grid.axes for grid in grids), strict=True))
    axes = tuple(_align_axis(column, symmetric or mode != "zeros") for column in columns)
    common = Grid(axes, mode)
    widest = [max(0, *(max(axis.before, axis.after) for axis in column)) for column in columns]
    if mode != "zeros" and any(axis.before > width for axis, width in zip(axes, widest, strict=True)):
        raise InexactError(f"{mode} padding of these widths together needs larger inputs than each of them")
    return common, tuple(_embed(grid, common) for grid in grids)


def layer_grid(grid: Grid) -> tuple[Grid, Embedding]:
    """``grid`` as a ``torch.nn`` layer can have it, and where its taps lie in that: symmetric, or ``padding="same"``.

    Raises:
        InexactError: where no layer pads like that.
    """
    if grid.is_same and not (grid.mode == "zeros" and grid.symmetric):
        return grid, Embedding((0,) * grid.dims, (1,) * grid.dims)
    common, (where,) = align([grid], symmetric=True)
    return common, where


def _common_mode(grids: Sequence[Grid]) -> str:
    """What stands at a padded position depends on the mode only, not on the width; unpadded grids read none."""
    modes = {grid.mode for grid in grids if grid.padded} or {"zeros"}
    if len(modes) > 1:
        raise InexactError(f"padding modes differ: {', '.join(sorted(modes))}")
    return modes.pop()


def _align_axis(axes: Sequence[Axis], symmetric: bool) -> Axis:
    strides = {axis.stride for axis in axes}
    if len(strides) > 1:
        raise InexactError(f"strides differ: {', '.join(map(str, sorted(strides)))}")
    first, last = min(axis.first for axis in axes), max(axis.last for axis in axes)
    steps = [axis.dilation for axis in axes if axis.kernel > 1] + [axis.first - first for axis in axes]
    excess = axes[0].excess
    before, after = -first, excess + last
    # nn.Conv pads both sides alike: taps of weight zero are added where the two sides differ.
    wide = (max(before, after, 0),) * 2 if symmetric else (before, after)
    step = gcd(*steps, wide[0] - before, wide[1] - after) or 1
    kernel = (last - first + (wide[0] - before) + (wide[1] - after)) // step + 1
    return Axis(kernel, axes[0].stride, step if kernel > 1 else 1, *wide)


def _embed(grid: Grid, common: Grid) -> Embedding:
    pairs = list(zip(grid.axes, common.axes, strict=True))
    start = tuple((small.first - large.first) // large.dilation for small, large in pairs)
    step = tuple(small.dilation // large.dilation if small.kernel > 1 else 1 for small, large in pairs)
    return Embedding(start, step)


def compose_grids(outer: Grid, inner: Grid) -> Grid:
    """The grid of ``outer(inner(x))``: offsets ``o_outer * s_inner + o_inner``, strides multiplied.

    Exactness at padded borders is the caller's business (:func:`rmfx.algebra.affine.compose`).
    """
    if outer.dims != inner.dims:
        raise InexactError(f"{outer.dims} and {inner.dims} spatial dimensions do not compose")
    axes = tuple(_compose_axis(o, i) for o, i in zip(outer.axes, inner.axes, strict=True))
    return Grid(axes, outer.mode if inner.samples else inner.mode)


def _compose_axis(outer: Axis, inner: Axis) -> Axis:
    spread = outer.dilation * inner.stride
    steps = [step for step, k in ((spread, outer.kernel), (inner.dilation, inner.kernel)) if k > 1]
    step = gcd(*steps) if steps else 1
    first = outer.first * inner.stride + inner.first
    last = outer.last * inner.stride + inner.last
    excess = inner.excess + inner.stride * outer.excess
    return Axis((last - first) // step + 1, outer.stride * inner.stride, step, -first, excess + last)
