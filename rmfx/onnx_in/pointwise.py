"""Activations, and functions of one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rmfx.onnx_in.call import Call, Rule, Rules, Value

# Parameters of ONNX are stored in float32: 1/6 there is 1/6 here.
_ROUNDING = 1e-6
_OPEN = (-math.inf, math.inf)
_SELU = (1.6732632423543772, 1.0507009873554805)


def _layer(cls: Callable[..., nn.Module], **attributes: tuple[str, float]) -> Rule:
    """The rule of a layer whose arguments are attributes of the node: ``argument=(attribute, default)``."""

    def rule(call: Call) -> Value:
        return call.layer(cls(**{name: call.attribute(*where) for name, where in attributes.items()}))

    return rule


def _function(function: Callable[..., Any]) -> Rule:
    def rule(call: Call) -> Value:
        return call.function(function, call.tensor())

    return rule


def clip(call: Call) -> Value:
    """``Clip``: ReLU and ReLU6 where the bounds are theirs."""
    low, high = _bound(call, "min", 1, -math.inf), _bound(call, "max", 2, math.inf)
    if low is None or high is None or not low < high:
        given = ((1, low), (2, high))
        bounds = [call.tensor(i) if call.has(i) else None if bound in _OPEN else bound for i, bound in given]
        return call.function(torch.clamp, call.tensor(), *bounds)
    if (low, high) == _OPEN:
        return call.value(0)
    if low == 0:
        return call.layer(nn.ReLU6() if high == 6 else nn.ReLU() if high == math.inf else nn.Hardtanh(0.0, high))
    return call.layer(nn.Hardtanh(low, high))


def _bound(call: Call, name: str, index: int, default: float) -> float | None:
    """A bound of ``Clip``: ``None`` where it is computed."""
    if not call.has(index):
        return float(call.attribute(name, default))
    found = call.value(index)
    if not isinstance(found, Tensor) or not found.is_floating_point():
        return None
    limit = torch.finfo(found.dtype).max  # exporters write "no bound" as the largest number there is
    bound = found.item()
    return default if abs(bound) >= limit and math.copysign(1, bound) == math.copysign(1, default) else bound


def prelu(call: Call) -> Value:
    """``PRelu`` with one slope, or one for each channel."""
    slope = call.constant(1, "slope")
    rank = call.rank()
    shape = (1,) * (rank - slope.dim()) + tuple(slope.shape)
    if len(shape) != rank or any(size != 1 for axis, size in enumerate(shape) if axis != 1):
        # A slope along other dimensions: max(x, 0) + slope * min(x, 0).
        x = call.tensor()
        return call.function(torch.where, call.function(torch.gt, x, 0), x, call.function(torch.mul, x, call.tensor(1)))
    layer = nn.PReLU(slope.numel(), device="meta")
    layer.weight = nn.Parameter(slope.reshape(-1))
    return call.layer(layer)


def gelu(call: Call) -> Value:
    """``Gelu``, exact or by tanh."""
    return call.layer(nn.GELU(approximate=call.attribute("approximate", "none")))


def selu(call: Call) -> Value:
    """``Selu`` with the two constants that torch has, too."""
    alpha, gamma = call.attribute("alpha", _SELU[0]), call.attribute("gamma", _SELU[1])
    if not all(math.isclose(a, b, rel_tol=_ROUNDING) for a, b in zip((alpha, gamma), _SELU, strict=True)):
        return call.function(torch.mul, call.layer(nn.ELU(alpha)), gamma)
    return call.layer(nn.SELU())


def hard_sigmoid(call: Call) -> Value:
    """``HardSigmoid``: torch's where slope and offset are 1/6 and 1/2, else a clamp of a scaled tensor."""
    alpha, beta = call.attribute("alpha", 0.2), call.attribute("beta", 0.5)
    if math.isclose(alpha, 1 / 6, rel_tol=_ROUNDING) and beta == 0.5:
        return call.layer(nn.Hardsigmoid())
    scaled = call.function(torch.add, call.function(torch.mul, call.tensor(), alpha), beta)
    return call.function(torch.clamp, scaled, 0.0, 1.0)


def thresholded_relu(call: Call) -> Value:
    """``ThresholdedRelu``."""
    return call.layer(nn.Threshold(call.attribute("alpha", 1.0), 0.0))


def shrink(call: Call) -> Value:
    """``Shrink``, soft or hard."""
    bias, bound = call.attribute("bias", 0.0), call.attribute("lambd", 0.5)
    if bias not in (0, bound):
        call.fail("a bias that is neither 0 nor lambd")
    return call.layer(nn.Hardshrink(bound) if bias == 0 else nn.Softshrink(bound))


def softmax(cls: type[nn.Softmax] | type[nn.LogSoftmax]) -> Rule:
    """``Softmax``; before opset 13 it works on a matrix, which is the same along the last dimension only."""

    def rule(call: Call) -> Value:
        axis = call.attribute("axis", -1 if call.opset >= 13 else 1)
        if call.opset < 13 and axis not in (-1, call.rank() - 1):
            flat = cls(dim=axis if axis < 0 else axis - call.rank())
            shape = call.shape() or ()
            if any(size != 1 for size in shape[axis % len(shape) + 1 :]):
                call.fail("before opset 13 it takes all dimensions from its axis on together")
            return call.layer(flat)
        return call.layer(cls(dim=axis))

    return rule


def identity(call: Call) -> Value:
    """What hands its input on: ``Identity``, and ``Dropout`` outside training."""
    return call.value(0)


def dropout(call: Call) -> Value:
    """``Dropout``, which does nothing outside training."""
    if call.has(2) and bool(call.constant(2, "training_mode").any()):
        call.fail("it drops at random: export the network in eval mode")
    if any(output.uses() for output in call.node.outputs[1:]):
        call.fail("its mask is read by other nodes")
    return call.value(0)


RULES: Rules = {
    "Relu": _layer(nn.ReLU),
    "LeakyRelu": _layer(nn.LeakyReLU, negative_slope=("alpha", 0.01)),
    "PRelu": prelu,
    "Elu": _layer(nn.ELU, alpha=("alpha", 1.0)),
    "Selu": selu,
    "Celu": _layer(nn.CELU, alpha=("alpha", 1.0)),
    "Gelu": gelu,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": _layer(nn.Hardswish),
    "Mish": _layer(nn.Mish),
    "Sigmoid": _layer(nn.Sigmoid),
    "Tanh": _layer(nn.Tanh),
    "Softplus": _layer(nn.Softplus),
    "Softsign": _layer(nn.Softsign),
    "Softmax": softmax(nn.Softmax),
    "LogSoftmax": softmax(nn.LogSoftmax),
    "ThresholdedRelu": thresholded_relu,
    "Shrink": shrink,
    "Clip": clip,
    "Identity": identity,
    "Dropout": dropout,
    **{
        name: _function(function)
        for name, function in {
            "Abs": torch.abs,
            "Ceil": torch.ceil,
            "Cos": torch.cos,
            "Erf": torch.erf,
            "Exp": torch.exp,
            "Floor": torch.floor,
            "Log": torch.log,
            "Neg": torch.neg,
            "Not": torch.logical_not,
            "Reciprocal": torch.reciprocal,
            "Round": torch.round,
            "Sign": torch.sign,
            "Sin": torch.sin,
            "Sqrt": torch.sqrt,
        }.items()
    },
}
