"""Pointwise nonlinearities: where they are the identity, where they map a range, how several become one.

A *pointwise step* of the rewritten network applies one activation to some channels and carries the others
unchanged. Families of layers can hold both exactly: slopes (PReLU: ReLU is slope 0, the identity slope 1),
bounds (per-channel clamp: ReLU6 is [0, 6], the identity unbounded) and masks (``where``). In the training form
batch norms are pointwise steps too, and their family is a wider norm.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rmfx.algebra.exact import on_cpu
from rmfx.algebra.widened import CARRIED as CARRIED
from rmfx.algebra.widened import NORMS as NORMS
from rmfx.algebra.widened import identity_norm as identity_norm
from rmfx.algebra.widened import widen_norm
from rmfx.modules import ChannelClamp, Elementwise, MaskedActivation

Range = tuple[float, float]
EVERYTHING: Range = (-math.inf, math.inf)

# Monotone activations: the image of an interval is spanned by the images of its ends.
_MONOTONE = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.SELU,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Tanh,
    nn.LogSigmoid,
    nn.Softsign,
    nn.Tanhshrink,
)
# Activations with one dip below zero, and a lower bound of it; above it they rise and stay below x.
_DIPPING: dict[type[nn.Module], float] = {nn.SiLU: -0.2785, nn.GELU: -0.1701, nn.Mish: -0.3089, nn.Hardswish: -0.375}
_OTHER = (
    nn.ELU,
    nn.CELU,
    nn.Softplus,
    nn.LeakyReLU,
    nn.RReLU,
    nn.PReLU,
    nn.Threshold,
    nn.Softshrink,
    nn.Hardshrink,
    ChannelClamp,
    MaskedActivation,
    Elementwise,
)
# What functions of single elements map everything into; of others, nothing is known.
_IMAGES: dict[str, Range] = {
    **dict.fromkeys(("abs", "square", "sqrt", "exp"), (0.0, math.inf)),
    **dict.fromkeys(("sin", "cos", "erf"), (-1.0, 1.0)),
    "atan": (-math.pi / 2, math.pi / 2),
    "cosh": (1.0, math.inf),
    "expm1": (-1.0, math.inf),
}
POINTWISE: tuple[type[nn.Module], ...] = (*_MONOTONE, *_DIPPING, *_OTHER)


def is_pointwise(module: nn.Module) -> bool:
    """Whether ``module`` is an activation that acts on every element by itself."""
    return type(module) in POINTWISE


def identity_range(module: nn.Module) -> Range | None:
    """The interval on which ``module(x) == x`` exactly in real arithmetic, or ``None``.

    An activation that jumps where its identity begins (Threshold, Softplus) has none: rounding could fall off.

    >>> identity_range(nn.ReLU6())
    (0.0, 6.0)
    """
    if isinstance(module, nn.ReLU6):
        return 0.0, 6.0
    if isinstance(module, nn.Hardtanh):
        return float(module.min_val), float(module.max_val)
    if isinstance(module, (nn.ReLU, nn.LeakyReLU, nn.RReLU, nn.PReLU, nn.ELU, nn.CELU)):
        return 0.0, math.inf
    if isinstance(module, nn.Hardswish):
        return 3.0, math.inf
    if isinstance(module, nn.Threshold) and module.value == module.threshold:
        return float(module.threshold), math.inf
    if isinstance(module, MaskedActivation):
        return identity_range(module.activation)
    if isinstance(module, ChannelClamp) and not module.low.is_meta:
        return float(module.low.max()), float(module.high.min())
    return None


def is_identity_on(module: nn.Module, values: Range) -> bool:
    """Whether ``module`` changes no value of the interval ``values``."""
    inside = identity_range(module)
    return inside is not None and inside[0] <= values[0] and values[1] <= inside[1]


def image(module: nn.Module, values: Range) -> Range:
    """An interval that holds ``module(x)`` for all ``x`` in ``values``.

    >>> image(nn.ReLU6(), (-1.0, 9.0))
    (0.0, 6.0)
    """
    low, high = values
    if is_identity_on(module, values):
        return values
    if type(module) in _MONOTONE or (isinstance(module, (nn.ELU, nn.CELU)) and module.alpha > 0):
        ends = module(torch.tensor([low, high], dtype=torch.float64))
        return EVERYTHING if bool(ends.isnan().any()) else (float(ends[0]), float(ends[1]))
    if isinstance(module, nn.Softplus) and module.beta > 0 and module.threshold >= 0:
        # drops where its threshold switches to x, so its ends tell less than this
        return max(0.0, low), max(0.0, high) + math.log(2.0) / module.beta
    if type(module) in _DIPPING:
        return (min(0.0, _DIPPING[type(module)]) if low < 0 else 0.0), max(0.0, high)
    if isinstance(module, (nn.LeakyReLU, nn.RReLU)):
        return _leaky_image(module, values)
    if isinstance(module, nn.Threshold):
        return min(float(module.value), max(low, module.threshold)), max(float(module.value), high)
    if isinstance(module, (nn.Softshrink, nn.Hardshrink)) and module.lambd >= 0:
        return min(low, 0.0), max(high, 0.0)
    if isinstance(module, MaskedActivation):
        inner = image(module.activation, values)
        return min(low, inner[0]), max(high, inner[1])
    if isinstance(module, ChannelClamp) and not module.low.is_meta:
        ends = [
            torch.maximum(torch.minimum(torch.tensor(end, dtype=torch.float64), module.high), module.low)
            for end in values
        ]
        return float(ends[0].min()), float(ends[1].max())
    return _IMAGES.get(module.function, EVERYTHING) if isinstance(module, Elementwise) else EVERYTHING


def _leaky_image(module: nn.LeakyReLU | nn.RReLU, values: Range) -> Range:
    """Below zero the slope is anything between two of them: random ones in training, their mean in eval mode."""
    slopes = (module.lower, module.upper) if isinstance(module, nn.RReLU) else (module.negative_slope,)
    low, high = values
    below = [slope * end if slope else 0.0 for slope in slopes for end in (low, min(high, 0.0))]
    return min(below), max(max(below), high)


def split_constant(module: nn.Module) -> float | None:
    """``k`` with ``module(t) - module(-t) == k * t`` for all ``t``, of activations that may be split, else ``None``.

    ``max(t, 0) - max(-t, 0) = t``; with a slope ``a`` below zero ``t + a*t``. A gated one is ``t * g(t)``, and
    ``t * g(t) + t * g(-t) = t`` where ``g(t) + g(-t) = 1``: the sigmoid of SiLU, the normal distribution function of
    GELU, in its tanh form ``(1 + odd) / 2``, the hard sigmoid of Hardswish. ``log(s(t) / s(-t)) = t`` for a sigmoid.

    >>> split_constant(nn.ReLU()), split_constant(nn.LeakyReLU(0.5)), split_constant(nn.ReLU6())
    (1.0, 1.5, None)
    """
    if type(module) in (nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.LogSigmoid):
        return 1.0
    slope = _slope_below_zero(module)
    return None if slope is None or slope == -1.0 else 1.0 + slope


def _slope_below_zero(module: nn.Module) -> float | None:
    if type(module) is nn.LeakyReLU:
        return float(module.negative_slope)
    if type(module) is nn.RReLU and not module.training:
        return (module.lower + module.upper) / 2
    if type(module) is nn.PReLU and module.num_parameters == 1 and not module.weight.is_meta:
        return float(module.weight.detach())
    return None


def split_is_stable(module: nn.Module) -> bool:
    """Whether the pair ``(module(u), module(-u))`` passes unchanged through ``module`` again, whatever ``u`` is.

    So it does where ``module`` is the identity on its own image; the others are recombined before each activation.

    >>> split_is_stable(nn.ReLU()), split_is_stable(nn.SiLU())
    (True, False)
    """
    return split_constant(module) is not None and is_identity_on(module, image(module, EVERYTHING))


def same_function(first: nn.Module, second: nn.Module) -> bool:
    """Whether two activation modules of one type have equal arguments and tensors."""
    if type(first) is not type(second) or repr(first) != repr(second):
        return False
    if isinstance(first, nn.Upsample) and first.align_corners != second.align_corners:  # which its repr does not tell
        return False
    mine, theirs = first.state_dict(), second.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@dataclass(frozen=True)
class Part:
    """Channels ``positions`` of a stack, and the activation they go through; ``None`` carries them unchanged."""

    activation: nn.Module | None
    positions: Tensor


def combine(parts: Sequence[Part], channels: int, axis: int) -> nn.Module | None:
    """One activation layer for ``channels`` stacked channels, or ``None`` when no family holds all parts.

    Channels that no part covers are dead: nothing reads what becomes of them.

    Args:
        parts: disjoint channel sets; at least one has an activation.
        channels: width of the stack.
        axis: channel axis, 1 for convolutions, -1 for linear layers.
    """
    acting = [part.activation for part in parts if part.activation is not None]
    uniform = len(acting) == len(parts) and all(same_function(acting[0], other) for other in acting)
    if uniform and not is_per_channel(acting[0]):
        return copy.deepcopy(acting[0])
    # A batch norm has its channels in dimension 1, which is also the last one where ``axis`` is -1.
    if (norm := widen_norm(parts, channels)) is not None:
        return norm
    families = (_as_slopes, _as_bounds, _as_mask)
    return next((layer for family in families if (layer := family(parts, channels, axis)) is not None), None)


def is_per_channel(module: nn.Module) -> bool:
    """Whether an activation treats its channels differently, and so fits one number of channels only."""
    if isinstance(module, nn.PReLU):
        return module.num_parameters > 1
    return isinstance(module, (ChannelClamp, MaskedActivation, *NORMS))


def _as_slopes(parts: Sequence[Part], channels: int, axis: int) -> nn.Module | None:
    if axis != 1:  # nn.PReLU reads its channels from dimension 1
        return None
    slopes = torch.zeros(channels, dtype=torch.float64)
    for part in parts:
        slope = _slopes(part.activation)
        if slope is None:
            return None
        slopes[part.positions] = slope.double()
    layer = nn.PReLU(channels, dtype=torch.float64)
    trains = any(p.requires_grad for part in parts if part.activation is not None for p in part.activation.parameters())
    layer.weight = nn.Parameter(slopes, requires_grad=trains)
    return layer


def _slopes(module: nn.Module | None) -> Tensor | None:
    """The slope below zero: a scalar, or one per channel of the part."""
    if module is None:
        return torch.tensor(1.0)
    if type(module) is nn.ReLU:
        return torch.tensor(0.0)
    if type(module) is nn.LeakyReLU:
        return torch.tensor(module.negative_slope, dtype=torch.float64)
    return on_cpu(module.weight, torch.float64) if type(module) is nn.PReLU else None


def _as_bounds(parts: Sequence[Part], channels: int, axis: int) -> nn.Module | None:
    low = torch.full((channels,), -math.inf, dtype=torch.float64)
    high = torch.full((channels,), math.inf, dtype=torch.float64)
    for part in parts:
        bounds = _bounds(part.activation)
        if bounds is None:
            return None
        low[part.positions], high[part.positions] = bounds[0].double(), bounds[1].double()
    return ChannelClamp(low, high, axis)


def _bounds(module: nn.Module | None) -> tuple[Tensor, Tensor] | None:
    if module is None:
        return torch.tensor(-math.inf), torch.tensor(math.inf)
    if type(module) is ChannelClamp:
        return module.low.cpu(), module.high.cpu()
    if type(module) in (nn.ReLU, nn.ReLU6, nn.Hardtanh):
        low, high = identity_range(module) or EVERYTHING
        return torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    return None


def _as_mask(parts: Sequence[Part], channels: int, axis: int) -> nn.Module | None:
    mask = torch.zeros(channels, dtype=torch.bool)
    chosen: nn.Module | None = None
    for part in parts:
        inner, active = _masked(part.activation)
        if inner is None:
            continue
        if is_per_channel(inner) or (chosen is not None and not same_function(chosen, inner)):
            return None
        chosen = inner
        mask[part.positions] = active
    return None if chosen is None else MaskedActivation(copy.deepcopy(chosen), mask, axis)


def _masked(module: nn.Module | None) -> tuple[nn.Module | None, Tensor]:
    if isinstance(module, MaskedActivation):
        return module.activation, module.mask.cpu()
    return module, torch.tensor(True)
