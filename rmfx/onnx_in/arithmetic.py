"""Sums, products, comparisons, reductions and casts; on sizes, too, which torch keeps as Python numbers."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from rmfx.modules import ChannelClamp
from rmfx.onnx_in.call import DTYPES, Call, Rule, Rules, Size, Sizes, Value
from rmfx.onnx_in.pooling import global_average

_ON_SIZES = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": operator.floordiv}


def _operand(call: Call, index: int, beside: int) -> Any:
    """Input ``index``; a single constant as a Python number, which takes on the dtype of the tensor beside it."""
    value = call.value(index)
    other = call.value(beside)
    if isinstance(value, Tensor) and value.numel() == 1 and isinstance(other, fx.Node):
        shape = call.shape(beside)
        if value.dim() == 0 or (shape is not None and value.dim() <= len(shape)):
            number = value.item()
            if not isinstance(number, float) or math.isfinite(number):
                return number
    return call.tensor(index)


def binary(function: Callable[..., Any]) -> Rule:
    """An operator of two tensors, or of sizes."""

    def rule(call: Call) -> Value:
        if any(isinstance(call.value(i), Sizes) for i in (0, 1)):
            return _on_sizes(call)
        return call.function(function, _operand(call, 0, 1), _operand(call, 1, 0))

    return rule


def _on_sizes(call: Call) -> Sizes:
    what = _ON_SIZES.get(call.node.op_type)
    if what is None:
        call.fail("arithmetic on sizes that torch does not do in Python numbers")
    left, right = call.sizes(0, "first operand"), call.sizes(1, "second operand")
    count = max(len(left.items), len(right.items))
    if any(len(side.items) not in (1, count) for side in (left, right)):
        call.fail("sizes of different lengths")
    pairs = ((side.items * count)[:count] for side in (left, right))
    return Sizes(tuple(_size(call, what, a, b) for a, b in zip(*pairs, strict=True)), left.scalar and right.scalar)


def _size(call: Call, what: Callable[[Any, Any], Any], a: Size, b: Size) -> Size:
    if isinstance(a, int) and isinstance(b, int):
        return int(what(a, b))
    return call.function(what, a, b)


def divide(call: Call) -> Value:
    """``Div``; of integers it rounds towards zero."""
    if any(isinstance(call.value(i), Sizes) for i in (0, 1)):
        return _on_sizes(call)
    operands = _operand(call, 0, 1), _operand(call, 1, 0)
    dtype = call.dtype(0) or call.dtype(1)
    if dtype is None:
        call.fail("the type of its input is not known: run onnx.shape_inference on the file first")
    if dtype.is_floating_point:
        return call.function(operator.truediv, *operands)
    return call.function(torch.div, *operands, rounding_mode="trunc")


def modulo(call: Call) -> Value:
    """``Mod``, with the sign of the divisor or, with ``fmod``, of the dividend."""
    function = torch.fmod if call.attribute("fmod", 0) else torch.remainder
    return call.function(function, _operand(call, 0, 1), _operand(call, 1, 0))


def power(call: Call) -> Value:
    """``Pow``, whose result has the type of the base; powers of integers are taken in float64, as onnxruntime does."""
    base, exponent = call.tensor(0), _operand(call, 1, 0)
    own, other = call.dtype(0), call.dtype(1)
    if own is None or other is None:
        return call.function(torch.pow, base, exponent)
    like = torch.empty(1, dtype=other) if isinstance(exponent, fx.Node) else exponent
    if torch.result_type(torch.empty(1, dtype=own), like) == own:
        return call.function(torch.pow, base, exponent)
    if not own.is_floating_point:
        base = call.method("to", base, torch.float64)
    return call.method("to", call.function(torch.pow, base, exponent), own)


def summed(call: Call) -> Value:
    """``Sum`` of any number of tensors, two at a time."""
    return _chain(call, operator.add)


def mean_of(call: Call) -> Value:
    """``Mean`` of any number of tensors."""
    total = _chain(call, operator.add)
    return call.function(operator.truediv, total, len(call.inputs)) if len(call.inputs) > 1 else total


def extreme(function: Callable[..., Any]) -> Rule:
    """``Max`` and ``Min`` of any number of tensors; of one tensor and a bound for each channel, a clamp."""

    def rule(call: Call) -> Value:
        return _clamped(call, function is torch.maximum) or _chain(call, function)

    return rule


def _clamped(call: Call, from_below: bool) -> Value | None:
    """The clamp that one bound of each channel is, together with the one on the other side that it may stand on."""
    shape, bound = call.shape(), call.inputs[-1]
    if len(call.inputs) != 2 or not isinstance(bound, Tensor) or not bound.is_floating_point() or shape is None:
        return None
    sizes = [1] * (len(shape) - bound.dim()) + list(bound.shape)
    wide = [axis for axis, size in enumerate(sizes) if size != 1]
    if len(sizes) != len(shape) or wide not in ([1], [len(shape) - 1]) or shape[wide[0]] != bound.numel():
        return None
    axis, bound = (1 if wide == [1] else -1), bound.flatten()
    unbounded = torch.full_like(bound, torch.inf)
    if not from_below:
        return call.layer(ChannelClamp(-unbounded, bound, axis))
    above = _upper_clamp(call)
    if above is None or above.axis != axis:
        return call.layer(ChannelClamp(bound, unbounded, axis))
    above.low = bound
    return call.tensor()


def _upper_clamp(call: Call) -> ChannelClamp | None:
    """The clamp that makes input 0, where it has no lower bounds and nothing else reads it."""
    value, source = call.node.inputs[0], call.tensor()
    if value is None or len(value.uses()) != 1 or value.is_graph_output() or source.op != "call_module":
        return None
    clamp = call.writer.root.get_submodule(str(source.target))
    return clamp if isinstance(clamp, ChannelClamp) and bool((clamp.low == -torch.inf).all()) else None


def _chain(call: Call, function: Callable[..., Any]) -> Value:
    if len(call.inputs) == 1:
        return call.value(0)
    tensors = [call.tensor(i) for i in range(len(call.inputs))]
    return functools.reduce(lambda a, b: call.function(function, a, b), tensors)


def where(call: Call) -> Value:
    """``Where``."""
    return call.function(torch.where, *(call.tensor(i) for i in range(3)))


def compare(function: Callable[..., Any]) -> Rule:
    """A comparison, or an operator of booleans."""

    def rule(call: Call) -> Value:
        return call.function(function, call.tensor(0), call.tensor(1))

    return rule


def cast(call: Call) -> Value:
    """``Cast`` and ``CastLike``."""
    if isinstance(call.value(0), Sizes):
        if not _stays_integer(call):
            call.fail("it makes floats of sizes")
        return call.value(0)
    wanted = call.dtype(1) if call.node.op_type == "CastLike" else DTYPES.get(ir.DataType(call.attribute("to")))
    if wanted is None:
        call.fail("the type it casts to is not known, or none of torch's")
    return call.value(0) if call.dtype(0) == wanted else call.method("to", call.tensor(), wanted)


def _stays_integer(call: Call) -> bool:
    return call.node.op_type == "Cast" and DTYPES.get(ir.DataType(call.attribute("to"))) in (torch.int64, torch.int32)


def reduce_mean(call: Call) -> Value:
    """``ReduceMean``; over all spatial dimensions it is a global average pool."""
    axes, keep = _axes(call), bool(call.attribute("keepdims", 1))
    shape = call.shape()
    rank = 0 if shape is None else len(shape)
    if axes and keep and 3 <= rank <= 5 and sorted(axis % rank for axis in axes) == list(range(2, rank)):
        return global_average(call)
    return _reduced(call, torch.mean)


def reduction(function: Callable[..., Any]) -> Rule:
    """``ReduceMax``, ``ReduceMin``: ``function`` takes a tensor, dimensions and ``keepdim``."""

    def rule(call: Call) -> Value:
        return _reduced(call, function)

    return rule


def reduce_sum(call: Call) -> Value:
    """``ReduceSum``, which keeps the type: torch sums integers in int64."""
    kept = call.dtype()
    return _reduced(call, torch.sum, **({} if kept is None or kept.is_floating_point else {"dtype": kept}))


def reduce_norm(call: Call) -> Value:
    """``ReduceL2``."""
    axes = _axes(call)
    if axes == []:
        call.fail("it reduces no dimension")
    axes = list(range(call.rank())) if axes is None else axes
    return call.function(torch.linalg.vector_norm, call.tensor(), 2, tuple(axes), bool(call.attribute("keepdims", 1)))


def _reduced(call: Call, function: Callable[..., Any], **options: Any) -> Value:
    axes = _axes(call)
    if axes == []:
        return call.value(0)
    axes = list(range(call.rank())) if axes is None else axes
    return call.function(function, call.tensor(), tuple(axes), bool(call.attribute("keepdims", 1)), **options)


def _axes(call: Call) -> list[int] | None:
    """The dimensions to reduce: ``None`` for all, empty for none."""
    axes = call.ints(1, "axes")
    return [] if not axes and call.attribute("noop_with_empty_axes", 0) else axes or None


def arg_extreme(function: Callable[..., Any]) -> Rule:
    """``ArgMax`` and ``ArgMin``; of equal values the first."""

    def rule(call: Call) -> Value:
        if call.attribute("select_last_index", 0):
            call.fail("of equal values it takes the last, torch any")
        return call.function(function, call.tensor(), call.attribute("axis", 0), bool(call.attribute("keepdims", 1)))

    return rule


RULES: Rules = {
    "Add": binary(operator.add),
    "Sub": binary(operator.sub),
    "Mul": binary(operator.mul),
    "Div": divide,
    "Mod": modulo,
    "Pow": power,
    "Sum": summed,
    "Mean": mean_of,
    "Max": extreme(torch.maximum),
    "Min": extreme(torch.minimum),
    "Where": where,
    "Equal": compare(torch.eq),
    "Greater": compare(torch.gt),
    "GreaterOrEqual": compare(torch.ge),
    "Less": compare(torch.lt),
    "LessOrEqual": compare(torch.le),
    "And": compare(torch.logical_and),
    "Or": compare(torch.logical_or),
    "Xor": compare(torch.logical_xor),
    "Cast": cast,
    "CastLike": cast,
    "ReduceMean": reduce_mean,
    "ReduceSum": reduce_sum,
    "ReduceMax": reduction(torch.amax),
    "ReduceMin": reduction(torch.amin),
    "ReduceL2": reduce_norm,
    "ArgMax": arg_extreme(torch.argmax),
    "ArgMin": arg_extreme(torch.argmin),
}
