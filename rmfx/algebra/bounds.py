"""Intervals that hold every channel of a value, and what maps and activations make of them.

Behind ``y = W*x + b`` a channel lies between ``W+ low + W- high + b`` and ``W+ high + W- low + b``, with the positive
and the negative part of ``W``; a tap that may read zero padding reads an interval with 0 in it. A channel whose
interval is one number is constant. Computed in float64 and widened by what that may have rounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rmfx.algebra.affine import Affine
from rmfx.algebra.grid import Axis, Grid
from rmfx.algebra.pointwise import EVERYTHING, NORMS, Range, image
from rmfx.algebra.widened import is_identity_at
from rmfx.modules import ChannelClamp, MaskedActivation

ROUNDING = 2.0**-52  # of one operation, relative; twice the unit roundoff
TYPICAL = 1.0  # root mean square of what nothing is known of: inputs are normalised by custom


@dataclass(frozen=True, eq=False)
class Bounds:
    """An interval per channel (``[C]``), or one for all channels (``[]``).

    Attributes:
        low, high: in float64; infinite where nothing is known.
        rms: an estimate, not a bound, of the root mean square, as if inputs of a layer were independent.
    """

    low: Tensor
    high: Tensor
    rms: Tensor

    @staticmethod
    def of(values: Range | tuple[Tensor, Tensor], rms: float | Tensor = TYPICAL) -> Bounds:
        """Bounds from plain numbers or tensors; the estimate of size is brought within them.

        >>> Bounds.of((-1.0, 3.0)).range
        (-1.0, 3.0)
        """
        low, high = (torch.as_tensor(end, dtype=torch.float64) for end in values)
        size = torch.as_tensor(rms, dtype=torch.float64).expand(low.shape)
        least = torch.maximum(low, -high).clamp(min=0.0)
        return Bounds(low, high, torch.minimum(torch.maximum(size, least), torch.maximum(low.abs(), high.abs())))

    @property
    def range(self) -> Range:
        """The interval of all channels together."""
        return float(self.low.min()), float(self.high.max())

    @property
    def constant(self) -> Tensor:
        """Which channels are one number, whatever the input."""
        return (self.low == self.high) & self.low.isfinite()

    def hull(self) -> Bounds:
        """One interval for all channels."""
        return Bounds.of(self.range, self.rms.square().mean().sqrt())

    def expand(self, channels: int) -> Bounds:
        """One interval for each of ``channels``."""
        return Bounds(*(end.expand(channels) for end in (self.low, self.high, self.rms)))

    def within(self, values: Bounds) -> Bounds:
        """What both say together; this one where they contradict each other."""
        low, high = torch.maximum(self.low, values.low), torch.minimum(self.high, values.high)
        empty = low > high
        return Bounds.of((torch.where(empty, self.low, low), torch.where(empty, self.high, high)), self.rms)


def join(parts: Sequence[tuple[Bounds, int]]) -> Bounds:
    """Bounds of a concat of ``(bounds, channels)``."""
    wide = [bounds.expand(channels) for bounds, channels in parts]
    return Bounds(*(torch.cat([getattr(part, name) for part in wide]) for name in ("low", "high", "rms")))


def sum_bounds(first: Bounds, second: Bounds) -> Bounds:
    """Bounds of ``x + y``."""
    low, high = first.low + second.low, first.high + second.high
    loose = ~(first.constant & second.constant)
    low, high = low - loose * _finite(low).abs() * ROUNDING, high + loose * _finite(high).abs() * ROUNDING
    return Bounds.of((low, high), (first.rms.square() + second.rms.square()).sqrt())


def product_bounds(first: Bounds, second: Bounds) -> Bounds:
    """Bounds of ``x * y``; 0 times an unknown number is 0."""
    pairs = itertools.product((first.low, first.high), (second.low, second.high))
    ends = torch.stack([(a * b).nan_to_num(0.0, torch.inf, -torch.inf) for a, b in pairs])
    low, high = ends.amin(0), ends.amax(0)
    loose = ~(first.constant & second.constant)
    low, high = low - loose * _finite(low).abs() * ROUNDING, high + loose * _finite(high).abs() * ROUNDING
    return Bounds.of((low, high), first.rms * second.rms)


def affine_bounds(affine: Affine, x: Bounds) -> Bounds:
    """Bounds of ``W*x + b``, per output channel, at every position.

    >>> from rmfx.algebra.affine import from_tensors
    >>> conv = from_tensors(torch.tensor([[2.0, -1.0]]), torch.tensor([5.0]), Grid())
    >>> low, high = affine_bounds(conv, Bounds.of((torch.tensor([0.0, 0.0]), torch.tensor([0.0, 3.0])))).range
    >>> round(low, 12), round(high, 12)
    (2.0, 5.0)
    """
    weight, bias = affine.weights()
    groups, taps = affine.groups, affine.grid.taps
    weight = weight.reshape(groups, affine.out_channels // groups, -1)
    x = x.expand(affine.in_channels)
    padded = padding_taps(affine.grid)
    low = torch.where(padded, x.low.clamp(max=0.0)[:, None], x.low[:, None].expand(-1, taps)).reshape(groups, -1)
    high = torch.where(padded, x.high.clamp(min=0.0)[:, None], x.high[:, None].expand(-1, taps)).reshape(groups, -1)
    offset = torch.zeros(affine.out_channels, dtype=torch.float64) if bias is None else bias
    offset = offset.reshape(groups, -1)

    used = (weight != 0).double()
    terms = (used.sum(2) + (offset != 0) - 1).clamp(min=0.0)
    least, most = _end(weight, low, high, offset, terms, -1), _end(weight, low, high, offset, terms, 1)
    varying = ((low != high) | low.isinf()).double()
    fixed = torch.einsum("goi,gi->go", used, varying) == 0
    exact = torch.einsum("goi,gi->go", weight, _finite(low)) + offset
    least, most = torch.where(fixed, exact, least), torch.where(fixed, exact, most)
    size = x.rms[:, None].expand(-1, taps).reshape(groups, -1).clamp(max=1e150)
    rms = (torch.einsum("goi,gi->go", weight.square(), size.square()) + offset.square()).sqrt()
    ends = (least.nan_to_num(-torch.inf, torch.inf, -torch.inf), most.nan_to_num(torch.inf, torch.inf, -torch.inf))
    return Bounds.of((ends[0].flatten(), ends[1].flatten()), rms.flatten())


def _end(weight: Tensor, low: Tensor, high: Tensor, offset: Tensor, terms: Tensor, side: int) -> Tensor:
    """The lower (``side`` -1) or upper (1) end, ``[groups, out/groups]``, moved outwards by what may be rounded."""
    falling, rising = (low, high) if side > 0 else (high, low)
    positive, negative = weight.clamp(min=0.0), weight.clamp(max=0.0)
    total, size, unknown = offset, offset.abs(), torch.zeros_like(offset)
    for part, values in ((positive, rising), (negative, falling)):
        total = total + torch.einsum("goi,gi->go", part, _finite(values))
        size = size + torch.einsum("goi,gi->go", part.abs(), _finite(values).abs())
        unknown = unknown + torch.einsum("goi,gi->go", (part != 0).double(), values.isinf().double())
    return torch.where(unknown > 0, side * torch.inf, total + side * terms * size * ROUNDING)


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isinf(), 0.0, values)


def padding_taps(grid: Grid) -> Tensor:
    """Which taps may read a padded zero at some size, bool ``[taps]``; the other modes pad with values of ``x``.

    >>> padding_taps(Grid.of((3,), padding=(1,))).tolist()
    [True, False, True]
    """
    if grid.mode != "zeros":
        return torch.zeros(grid.taps, dtype=torch.bool)
    per_axis = [[_reads_padding(axis, tap) for tap in range(axis.kernel)] for axis in grid.axes]
    return torch.tensor([any(index) for index in itertools.product(*per_axis)], dtype=torch.bool)


def _reads_padding(axis: Axis, tap: int) -> bool:
    """The first position reads ``offset``, the last one at most ``size - 1 + excess + offset``."""
    offset = tap * axis.dilation - axis.before
    return offset < 0 or offset + axis.excess > 0


def activation_bounds(module: nn.Module, x: Bounds) -> Bounds:
    """Bounds of a pointwise ``module``, per channel; a constant stays one.

    Of a batch norm, of the channels on which it is the identity; the others are maps (:func:`affine_bounds`).
    """
    if isinstance(module, MaskedActivation):
        inner, x = activation_bounds(module.activation, x), x.expand(len(module.mask))
        low, high = (torch.where(module.mask.cpu(), a, b) for a, b in ((inner.low, x.low), (inner.high, x.high)))
    elif isinstance(module, ChannelClamp) and not module.low.is_meta:
        ends = module.low.double().cpu(), module.high.double().cpu()
        low, high = (torch.maximum(torch.minimum(end, ends[1]), ends[0]) for end in (x.low, x.high))
    elif isinstance(module, nn.PReLU) and not module.weight.is_meta:
        low, high = _slope_bounds(module.weight.detach().double().cpu(), x)
    elif isinstance(module, NORMS):
        same, x = is_identity_at(module), x.expand(module.num_features)
        low, high = (torch.where(same, end, worst) for end, worst in zip((x.low, x.high), EVERYTHING, strict=True))
    else:
        pairs, index = torch.stack([x.low.reshape(-1), x.high.reshape(-1)], 1).unique(dim=0, return_inverse=True)
        images = torch.tensor([_image(module, (a, b)) for a, b in pairs.tolist()], dtype=torch.float64)
        low, high = (images[:, end][index].reshape(x.low.shape) for end in (0, 1))
    return Bounds.of((low, high), x.rms.expand(low.shape))


def _image(module: nn.Module, values: Range) -> Range:
    known = values[0] == values[1] and values[0] not in EVERYTHING
    if not known or module.state_dict() or (isinstance(module, nn.RReLU) and module.training):
        return image(module, values)
    value = float(module(torch.tensor(values[0], dtype=torch.float64)))
    return value, value


def _slope_bounds(slopes: Tensor, x: Bounds) -> tuple[Tensor, Tensor]:
    slopes = slopes.reshape(()) if slopes.numel() == 1 else slopes
    ends = [torch.where(slopes == 0, 0.0, slopes * end.clamp(max=0.0)) for end in (x.low, x.high)]
    below = torch.minimum(*ends), torch.maximum(*ends)
    above = torch.where(x.high > 0, x.high, below[1])
    return torch.where(x.low >= 0, x.low, below[0]), torch.where(x.low >= 0, x.high, torch.maximum(below[1], above))
