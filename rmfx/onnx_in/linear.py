"""Convolutions, linear layers, products of matrices, and norms."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.onnx_in.call import Call, Rules, Value
from rmfx.onnx_in.windows import pad_before, window

_CONVS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS: dict[int, Any] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
_INSTANCE_NORMS: tuple[Any, ...] = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def conv(call: Call) -> Value:
    """``Conv``: padding that is not symmetric becomes a layer of its own in front."""
    weight, bias = call.constant(1, "weight"), call.optional(2, "bias")
    dims = _dims(call, weight, _CONVS)
    where = window(call, tuple(weight.shape[2:]))
    source = call.tensor()
    groups = call.attribute("group", 1)
    if not where.symmetric:
        source, where = pad_before(call, source, where), where.unpadded()
    layer = _CONVS[dims - 1](
        weight.shape[1] * groups,
        weight.shape[0],
        where.kernel,
        where.stride,
        where.before,
        where.dilation,
        groups,
        bias is not None,
        device="meta",
    )
    return call.layer(_with(layer, weight=weight, bias=bias), source)


def conv_transpose(call: Call) -> Value:
    """``ConvTranspose`` with explicit symmetric padding."""
    weight, bias = call.constant(1, "weight"), call.optional(2, "bias")
    dims = _dims(call, weight, _TRANSPOSED)
    if call.attribute("output_shape") is not None or call.attribute("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        call.fail("its padding is given by output_shape or auto_pad; only explicit pads are read")
    where = window(call, tuple(weight.shape[2:]))
    more = tuple(call.attribute("output_padding", (0,) * dims))
    if any(end > start for start, end in zip(where.before, where.after, strict=True)):
        call.fail("it cuts off more at the end than at the beginning, which torch cannot express")
    more = tuple(m + a - b for m, a, b in zip(more, where.before, where.after, strict=True))
    groups = call.attribute("group", 1)
    layer = _TRANSPOSED[dims - 1](
        weight.shape[0],
        weight.shape[1] * groups,
        where.kernel,
        where.stride,
        where.before,
        more,
        groups,
        bias is not None,
        where.dilation,
        device="meta",
    )
    return call.layer(_with(layer, weight=weight, bias=bias))


def gemm(call: Call) -> Value:
    """``Gemm``: a linear layer where its matrix is constant, else what it says."""
    alpha, beta = call.attribute("alpha", 1.0), call.attribute("beta", 1.0)
    matrix, bias = call.value(1), call.inputs[2] if call.has(2) else None
    if isinstance(matrix, Tensor) and (bias is None or isinstance(bias, Tensor)) and not call.attribute("transA", 0):
        weight = matrix if call.attribute("transB", 0) else matrix.T.contiguous()
        shift = None if bias is None else _row(bias, len(weight))
        if bias is None or shift is not None:
            scaled = None if shift is None else _times(shift, beta)
            return _linear(call, _times(weight, alpha), scaled)
    left, right = call.tensor(0), call.tensor(1)
    left = call.method("t", left) if call.attribute("transA", 0) else left
    right = call.method("t", right) if call.attribute("transB", 0) else right
    product = _scaled(call, call.function(torch.matmul, left, right), alpha)
    return product if bias is None else call.function(operator.add, product, _scaled(call, call.tensor(2), beta))


def matmul(call: Call) -> Value:
    """``MatMul``: a linear layer without bias where the second factor is a constant matrix."""
    matrix = call.value(1)
    if isinstance(matrix, Tensor) and matrix.dim() == 2 and not isinstance(call.value(0), Tensor):
        return _linear(call, matrix.T.contiguous(), None)
    return call.function(torch.matmul, call.tensor(0), call.tensor(1))


def einsum(call: Call) -> Value:
    """``Einsum``."""
    return call.function(torch.einsum, call.attribute("equation"), *(call.tensor(i) for i in range(len(call.inputs))))


def batch_norm(call: Call) -> Value:
    """``BatchNormalization`` by running statistics."""
    if call.attribute("training_mode", 0) or sum(bool(output.uses()) for output in call.node.outputs[1:]):
        call.fail("it normalises by the statistics of each batch: export the network in eval mode")
    rank = call.rank()
    if rank not in _BATCH_NORMS or not call.attribute("spatial", 1):
        call.fail(f"torch has no batch norm for its input of {rank} dimensions")
    weight, bias, mean, var = (
        call.constant(i, name) for i, name in ((1, "scale"), (2, "B"), (3, "mean"), (4, "variance"))
    )
    layer = _BATCH_NORMS[rank](len(mean), call.attribute("epsilon", 1e-5), device="meta")
    layer.running_mean, layer.running_var = mean, var
    layer.num_batches_tracked = torch.zeros((), dtype=torch.long)
    return call.layer(_with(layer, weight=weight, bias=bias))


def instance_norm(call: Call) -> Value:
    """``InstanceNormalization``."""
    weight, bias, rank = call.constant(1, "scale"), call.constant(2, "B"), call.rank()
    if not 3 <= rank <= 5:
        call.fail(f"torch has no instance norm for its input of {rank} dimensions")
    layer = _INSTANCE_NORMS[rank - 3](len(weight), call.attribute("epsilon", 1e-5), affine=True, device="meta")
    return call.layer(_with(layer, weight=weight, bias=bias))


def group_norm(call: Call) -> Value:
    """``GroupNormalization`` with a scale per channel; that of opset 18, with one per group, is no valid ONNX now."""
    weight, bias = call.constant(1, "scale"), call.constant(2, "bias")
    layer = nn.GroupNorm(call.attribute("num_groups"), len(weight), call.attribute("epsilon", 1e-5), device="meta")
    return call.layer(_with(layer, weight=weight, bias=bias))


def layer_norm(call: Call) -> Value:
    """``LayerNormalization`` over the last dimensions; its scale and bias may be spread over them."""
    weight, bias, axis = call.constant(1, "scale"), call.optional(2, "bias"), call.attribute("axis", -1)
    if any(output.uses() for output in call.node.outputs[1:]):
        call.fail("its mean or deviation is read by other nodes")
    sizes = _normalised(call, -axis if axis < 0 else call.rank() - axis, weight)
    layer = nn.LayerNorm(sizes, call.attribute("epsilon", 1e-5), bias=bias is not None, device="meta")
    shift = None if bias is None else _spread(call, bias, sizes)
    return call.layer(_with(layer, weight=_spread(call, weight, sizes), bias=shift))


def _normalised(call: Call, count: int, weight: Tensor) -> tuple[int, ...]:
    """The last ``count`` sizes of the input: those of ``weight`` where the file does not tell them."""
    shape = call.shape()
    known = tuple(size for size in shape[-count:] if size is not None) if shape is not None else ()
    if len(known) == count:
        return known
    if weight.dim() != count or 1 in weight.shape:
        call.fail(f"the last {count} sizes of its input, over which it normalises, are not known")
    return tuple(weight.shape)


def _spread(call: Call, weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
    whole = (1,) * (len(sizes) - weight.dim()) + tuple(weight.shape)
    if len(whole) != len(sizes) or any(size not in (1, full) for size, full in zip(whole, sizes, strict=True)):
        call.fail(f"a tensor of shape {tuple(weight.shape)} cannot be spread over {sizes}, which it normalises over")
    return weight.expand(sizes).contiguous()


def local_response_norm(call: Call) -> Value:
    """``LRN``."""
    size = call.attribute("size")
    if size % 2 == 0:
        call.fail("an even size: torch lays its window on other channels")
    alpha, beta, bias = call.attribute("alpha", 1e-4), call.attribute("beta", 0.75), call.attribute("bias", 1.0)
    return call.layer(nn.LocalResponseNorm(size, alpha, beta, bias))


def _dims(call: Call, weight: Tensor, layers: tuple[Any, ...]) -> int:
    dims = weight.dim() - 2
    if not 1 <= dims <= len(layers):
        call.fail(f"its weight has {weight.dim()} dimensions, torch convolves with 3 to 5")
    return dims


def _with(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    for name, tensor in tensors.items():
        layer.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
    return layer


def _linear(call: Call, weight: Tensor, bias: Tensor | None) -> fx.Node:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    return call.layer(_with(layer, weight=weight, bias=bias))


def _row(bias: Tensor, width: int) -> Tensor | None:
    """``bias`` as one value per column, where it is the same in every row."""
    if bias.dim() > 2 or (bias.dim() == 2 and bias.shape[0] != 1):
        return None
    return bias.reshape(-1).expand(width).contiguous()


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor


def _scaled(call: Call, tensor: fx.Node, factor: float) -> fx.Node:
    return tensor if factor == 1 else call.function(operator.mul, tensor, factor)


RULES: Rules = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "MatMul": matmul,
    "Einsum": einsum,
    "BatchNormalization": batch_norm,
    "InstanceNormalization": instance_norm,
    "GroupNormalization": group_norm,
    "LayerNormalization": layer_norm,
    "LRN": local_response_norm,
}
