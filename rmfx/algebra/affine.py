"""Linear maps of a CNN as values: the algebra that every pass is built on (docs/design.md).

An :class:`Affine` is ``y = W * x + b`` on a tap grid, for 0 to 3 spatial dimensions, so that Linear and Conv1d to
Conv3d are one case, and batch norm, a scale, an average pool and the identity (the paper's Dirac filter, its equation
1) are depthwise ones. Shapes and exactness are known at once; weights are computed only when the finished network is
emitted, in float64, and rounded once. So planning never touches a weight, and no intermediate network is ever held.

Functions here either return the exact result or raise :class:`rmfx.errors.InexactError` with the broken condition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rmfx.algebra import kernels
from rmfx.algebra.exact import is_rounded, on_cpu
from rmfx.algebra.grid import Grid, align, compose_grids, layer_grid
from rmfx.algebra.recall import recalled
from rmfx.errors import InexactError

Weights = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, eq=False)
class Affine:
    """A linear map with a constant: convolution, linear layer, norm, scale, pool or identity.

    Attributes:
        in_channels, out_channels, groups: as in ``nn.Conv2d``.
        grid: taps; with 0 axes for a linear layer.
        has_bias: whether ``b`` is there at all.
        compute: ``dtype -> (W [out, in/groups, *kernel], b [out] or None)`` on the CPU, computed in float64; ``W`` is
            rounded once to ``dtype``, ``b`` stays in float64, since it may still be added to others.
        sources: names of the user's parameters that the weights are made of.
        stored: ``W`` and ``b`` as the user's model holds them, where the map is a layer of it as it stands.
    """

    in_channels: int
    out_channels: int
    groups: int
    grid: Grid
    has_bias: bool
    compute: Callable[[torch.dtype], Weights]
    sources: frozenset[str] = frozenset()
    stored: Weights | None = None

    def weights(self) -> Weights:
        """``(W, b)`` in float64, to read only: they may be kept (:mod:`rmfx.algebra.recall`)."""
        return recalled(self, lambda: self.compute(torch.float64))

    @property
    def diagonal(self) -> bool:
        """Whether every channel is only scaled and shifted: a norm, a scale, the identity."""
        return self.groups == self.in_channels == self.out_channels and self.grid.samples and self.unstrided

    @property
    def unstrided(self) -> bool:
        """Whether every stride is 1."""
        return all(stride == 1 for stride in self.grid.stride)

    @property
    def macs_per_position(self) -> int:
        """Multiply-accumulates per output position."""
        return self.out_channels * (self.in_channels // self.groups) * self.grid.taps

    @property
    def parameters(self) -> int:
        """Number of weights and biases."""
        return self.macs_per_position + (self.out_channels if self.has_bias else 0)


def rounded(function: Callable[[], Weights]) -> Callable[[torch.dtype], Weights]:
    """Lift a float64 computation to the ``compute`` of an :class:`Affine`: run it, round once."""

    def compute(dtype: torch.dtype) -> Weights:
        weight, bias = function()
        return weight.to(dtype), bias

    return compute


def from_tensors(
    weight: Tensor, bias: Tensor | None, grid: Grid, groups: int = 1, sources: frozenset[str] = frozenset()
) -> Affine:
    """The map of a convolution or linear layer with this ``weight`` and ``bias`` (not copied).

    >>> conv = from_tensors(torch.ones(4, 1, 3, 3), None, Grid.of((3, 3), padding=(1, 1)), groups=2)
    >>> conv.in_channels, conv.out_channels, conv.macs_per_position
    (2, 4, 36)
    """
    stored = None if any(t is not None and is_rounded(t) for t in (weight, bias)) else (weight, bias)

    def compute(dtype: torch.dtype) -> Weights:
        return on_cpu(weight, dtype), None if bias is None else on_cpu(bias, torch.float64)

    return Affine(weight.shape[1] * groups, weight.shape[0], groups, grid, bias is not None, compute, sources, stored)


def per_channel(
    scale_shift: Callable[[], tuple[Tensor, Tensor | None]],
    channels: int,
    dims: int,
    has_bias: bool,
    sources: frozenset[str] = frozenset(),
) -> Affine:
    """``y_c = scale_c * x_c + shift_c``; ``scale_shift`` gives both as ``[channels]``, in float64, when asked."""

    def compute() -> Weights:
        scale, shift = scale_shift()
        return scale.reshape(channels, 1, *[1] * dims), shift

    grid = Grid.sampling([1] * dims)
    return Affine(channels, channels, channels, grid, has_bias, rounded(compute), sources)


def uniform(channels: int, dims: int, factor: float, shift: float) -> Affine:
    """``factor * x + shift`` on every channel.

    >>> uniform(2, 0, 3.0, 1.0).weights()[1]
    tensor([1., 1.], dtype=torch.float64)
    """

    def scale_shift() -> tuple[Tensor, Tensor | None]:
        both = torch.tensor([factor, shift], dtype=torch.float64)
        return both[0].expand(channels), both[1].expand(channels) if shift else None

    return per_channel(scale_shift, channels, dims, bool(shift))


def dirac(channels: int, grid: Grid) -> Affine:
    """The identity on ``channels`` (strided by ``grid``, which must be a sampling grid): the paper's equation 1."""
    assert grid.samples
    return from_tensors(torch.ones(channels, 1, *[1] * grid.dims), None, grid, groups=channels)


def selection(in_channels: int, indices: Sequence[int], dims: int) -> Affine:
    """The map whose output channel ``r`` is the input channel ``indices[r]``, or zero where that is negative.

    >>> selection(3, [2, -1], dims=0).weights()[0].tolist()
    [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    rows = torch.tensor(list(indices), dtype=torch.long).clamp(min=-1)

    def compute() -> Weights:
        weight = torch.eye(in_channels + 1, in_channels, dtype=torch.float64)[rows]  # row -1 is the last one: zeros
        return weight.reshape(*weight.shape, *[1] * dims), None

    return Affine(in_channels, len(rows), 1, Grid.sampling([1] * dims), False, rounded(compute))


def average_pool(channels: int, grid: Grid, divisor: int) -> Affine:
    """Mean over ``divisor`` positions as a depthwise convolution; the divisor must not vary at the borders."""
    weight = torch.full((1,), 1.0 / divisor, dtype=torch.float64).expand(channels, 1, *grid.kernel)
    return from_tensors(weight, None, grid, groups=channels)


def scaled(affine: Affine, factor: float, bias_factor: float) -> Affine:
    """``factor * W`` with ``bias_factor * b``; the very same map when both are 1."""
    if factor == bias_factor == 1.0:
        return affine

    def compute() -> Weights:
        weight, bias = affine.weights()
        return weight * factor, None if bias is None or not bias_factor else bias * bias_factor

    return replace(affine, compute=rounded(compute), has_bias=affine.has_bias and bool(bias_factor), stored=None)


def dense(affine: Affine) -> Affine:
    """The same map with one group."""
    if affine.groups == 1:
        return affine

    def compute() -> Weights:
        weight, bias = affine.weights()
        return kernels.regroup(weight, affine.groups, 1), bias

    return replace(affine, compute=rounded(compute), groups=1, stored=None)


def compose(outer: Affine, inner: Affine) -> Affine:
    """``outer(inner(x))`` as one map.

    Exact when one of:

    1. ``outer`` pads nothing: every tap reads a computed position of ``inner``;
    2. ``inner`` has one tap, and the padding of ``outer`` commutes with it: zero padding in both, and no bias in
       ``inner`` (padding would see 0, not the bias), or another padding mode and neither stride nor padding in it.

    Raises:
        InexactError: with the condition that is broken.
    """
    if outer.in_channels != inner.out_channels:
        raise InexactError(f"{inner.out_channels} channels feed a map of {outer.in_channels}")
    if outer.grid.padded:
        _require_padding_commutes(outer, inner)
    grid = compose_grids(outer.grid, inner.grid)
    layer_grid(grid)  # raises where no layer pads like that
    groups = math.gcd(outer.groups, inner.groups)

    def compute() -> Weights:
        return _compose(outer, inner, grid, groups)

    def compute_rows(dtype: torch.dtype) -> Weights:
        return _scale_rows(outer, inner, dtype)

    return Affine(
        inner.in_channels,
        outer.out_channels,
        groups,
        grid,
        outer.has_bias or inner.has_bias,
        compute_rows if outer.diagonal else rounded(compute),
        outer.sources | inner.sources,
    )


def _require_padding_commutes(outer: Affine, inner: Affine) -> None:
    zeros = outer.grid.mode == inner.grid.mode == "zeros"  # what zero padding adds to zero padding is zero padding
    if not all(a.kernel == 1 and (a.samples or (zeros and min(a.before, a.after) >= 0)) for a in inner.grid.axes):
        raise InexactError("the outer convolution pads what the inner one, which is not 1x1, has already padded")
    if outer.grid.mode == "zeros" and inner.has_bias:
        raise InexactError("zero padding of the outer convolution would see 0 where the inner bias should stand")
    if outer.grid.mode != "zeros" and not inner.unstrided:
        raise InexactError(f"{outer.grid.mode} padding does not commute with a stride")


def _compose(outer: Affine, inner: Affine, grid: Grid, groups: int) -> Weights:
    outer_weight, outer_bias = outer.weights()
    inner_weight, inner_bias = inner.weights()
    outer_weight = kernels.regroup(outer_weight, outer.groups, groups)
    inner_weight = kernels.regroup(inner_weight, inner.groups, groups)
    steps = [(a.dilation, o, i) for a, o, i in zip(grid.axes, outer.grid.axes, inner.grid.axes, strict=True)]
    outer_weight = _on_lattice(outer_weight, [o.dilation * i.stride // d for d, o, i in steps])
    inner_weight = _on_lattice(inner_weight, [i.dilation // d for d, o, i in steps])
    weight = kernels.compose_weights(outer_weight, inner_weight, groups)
    shift = None if inner_bias is None else kernels.compose_bias(outer_weight, inner_bias, groups)
    return weight, _sum(outer_bias, shift)


def _scale_rows(outer: Affine, inner: Affine, dtype: torch.dtype) -> Weights:
    """A norm behind a convolution, the commonest composition: piece by piece, so that no large float64 copy is made."""
    outer_weight, shift = outer.weights()
    scale = outer_weight.flatten()
    inner_weight, inner_bias = inner.stored or inner.weights()
    weight = kernels.scale_rows(inner_weight.detach().cpu(), scale, dtype)
    return weight, _sum(shift, None if inner_bias is None else scale * inner_bias.detach().to("cpu", torch.float64))


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _on_lattice(weight: Tensor, step: Sequence[int]) -> Tensor:
    """Spread taps ``step`` apart (a single tap has no neighbour to keep apart from)."""
    kernel = [(k - 1) * s + 1 for k, s in zip(weight.shape[2:], step, strict=True)]
    return kernels.spread(weight, kernel, tuple(slice(None, None, max(s, 1)) for s in step))


def add(first: Affine, second: Affine) -> Affine:
    """``first(x) + second(x)`` as one map; the output size is that of ``first``.

    Exact when strides and padding modes agree and the taps fit one grid. Callers make sure that both outputs
    have the same size (equal excess, or equal sizes at the sizes converted for).
    """
    if (first.in_channels, first.out_channels) != (second.in_channels, second.out_channels):
        raise InexactError(
            f"channels differ: {first.in_channels} to {first.out_channels}, "
            f"{second.in_channels} to {second.out_channels}"
        )
    grid, embeddings = align([first.grid, second.grid])
    groups = math.gcd(first.groups, second.groups)

    def compute() -> Weights:
        weight: Tensor | None = None
        bias: Tensor | None = None
        for term, where in zip((first, second), embeddings, strict=True):
            w, b = term.weights()
            w = kernels.spread(kernels.regroup(w, term.groups, groups), grid.kernel, where.slices(term.grid.kernel))
            weight = w if weight is None else weight + w
            bias = _sum(bias, b)
        assert weight is not None
        return weight, bias

    return Affine(
        first.in_channels,
        first.out_channels,
        groups,
        grid,
        first.has_bias or second.has_bias,
        rounded(compute),
        first.sources | second.sources,
    )
