"""Operators that move values and compute none: reshape, transpose, concat, slices, gathers, and shapes themselves."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from rmfx.onnx_in.call import Call, Rules, Size, Sizes, Value, as_tensor

_FAR = 2**31 - 1  # exporters write the end of a slice that has none as this, or more


def shape(call: Call) -> Value:
    """``Shape``: fixed sizes as numbers, free ones read from the tensor."""
    known, source = call.shape(), call.tensor()
    if known is None:
        call.fail("the number of dimensions of its input is not known")
    first, last = call.attribute("start", 0), call.attribute("end", len(known))
    return Sizes(tuple(_size_of(call, source, known, axis) for axis in range(len(known))[first:last]))


def _size_of(call: Call, source: fx.Node, known: tuple[int | None, ...], axis: int) -> Size:
    size = known[axis]
    return call.method("size", source, axis) if size is None else size


def reshape(call: Call) -> Value:
    """``Reshape``; ``flatten`` where it keeps the first dimension and joins the others."""
    if isinstance(call.value(0), Sizes):
        return Sizes(call.sizes(0, "input").items, scalar=not call.sizes(1, "shape").items)
    source, known = call.tensor(), call.shape()
    target = list(call.sizes(1, "shape").items)
    if not call.attribute("allowzero", 0):
        target = [call.method("size", source, axis) if size == 0 else size for axis, size in enumerate(target)]
    elif 0 in target:
        call.fail("it makes a tensor without elements")
    if len(target) == 2 and _keeps_batch(source, known, target):
        return call.function(torch.flatten, source, 1)
    return call.method("reshape", source, *target)


def _keeps_batch(source: fx.Node, known: tuple[int | None, ...] | None, target: list[Size]) -> bool:
    if known is None or len(known) < 2:
        return False
    batch, rest = target
    if None not in known[1:] and rest == math.prod(size for size in known[1:] if size is not None):
        return True  # the number of elements stays, so the first dimension does
    reads_batch = isinstance(batch, fx.Node) and batch.target == "size" and batch.args == (source, 0)
    return rest == -1 and (reads_batch or (known[0] is not None and batch == known[0]))


def flatten(call: Call) -> Value:
    """``Flatten`` into a matrix."""
    axis, source = call.attribute("axis", 1), call.tensor()
    if axis < 0:
        axis += call.rank()
    if axis and axis == len(call.shape() or ()):
        return call.function(torch.unsqueeze, call.function(torch.flatten, source), 1)
    if axis == 1:
        return call.function(torch.flatten, source, 1)
    flat = call.function(torch.flatten, source, axis) if axis else call.function(torch.flatten, source)
    return call.function(torch.unsqueeze, flat, 0) if not axis else call.function(torch.flatten, flat, 0, axis - 1)


def squeeze(call: Call) -> Value:
    """``Squeeze``."""
    if isinstance(call.value(0), Sizes):
        return Sizes(call.sizes(0, "input").items, scalar=True)
    axes = call.ints(1, "axes")
    if axes is None:
        known = call.shape()
        if known is None or None in known:
            call.fail("it drops every dimension of size 1, and not all sizes are fixed: give its axes")
        axes = [axis for axis, size in enumerate(known) if size == 1]
    return call.function(torch.squeeze, call.tensor(), tuple(axes))


def unsqueeze(call: Call) -> Value:
    """``Unsqueeze``."""
    if isinstance(call.value(0), Sizes):
        return Sizes(call.sizes(0, "input").items)
    axes = call.ints(1, "axes") or []
    if any(axis < 0 for axis in axes):
        total = call.rank() + len(axes)
        axes = [axis % total for axis in axes]
    result = call.tensor()
    for axis in sorted(axes):
        result = call.function(torch.unsqueeze, result, axis)
    return result


def transpose(call: Call) -> Value:
    """``Transpose``."""
    order = call.attribute("perm")
    if order is None:
        order = tuple(reversed(range(call.rank())))
    return call.method("permute", call.tensor(), *order)


def concat(call: Call) -> Value:
    """``Concat`` of tensors, or of sizes."""
    axis, count = call.attribute("axis", 0), len(call.inputs)
    if any(isinstance(value, Sizes) for value in call.inputs):
        return Sizes(tuple(item for i in range(count) for item in call.sizes(i, "sizes").items))
    if axis < 0:
        axis += call.rank()
    return call.function(torch.cat, tuple(call.tensor(i) for i in range(count)), axis)


def split(call: Call) -> Value | tuple[Value, ...]:
    """``Split`` into parts of given sizes, or equal ones."""
    axis, count = call.attribute("axis", 0), len(call.node.outputs)
    sizes = call.ints(1, "split")
    if sizes is None:
        whole = (call.shape() or ())[axis % call.rank()]
        if whole is None:
            call.fail("the size of what it splits is not known")
        part = -(-whole // count)
        if whole < part * (count - 1):
            call.fail(f"it cuts {whole} into {count} parts of {part}, and nothing is left for the last")
        sizes = [part] * (count - 1) + [whole - part * (count - 1)]
    parts = call.function(torch.split, call.tensor(), sizes, axis)
    return tuple(call.function(operator.getitem, parts, i) for i in range(count))


def cut(call: Call) -> Value:
    """``Slice``."""
    starts, ends = _ends(call, 1, "starts"), _ends(call, 2, "ends")
    axes = call.ints(3, "axes") or list(range(len(starts)))
    steps = call.ints(4, "steps") if call.has(4) else None
    steps = steps or [1] * len(starts)
    if isinstance(call.value(0), Sizes):
        items = call.sizes(0, "input").items
        if not isinstance(starts[0], int) or not isinstance(ends[0], int):
            call.fail("a slice of sizes by computed bounds")
        return Sizes(items[starts[0] : ends[0] if ends[0] > -_FAR else None : steps[0]])
    if any(step < 1 for step in steps):
        return _reversed(call, starts, ends, axes, steps)
    if any(axis < 0 for axis in axes):
        axes = [axis % call.rank() for axis in axes]
    slices: list[slice] = [slice(None)] * (max(axes) + 1)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        last = None if isinstance(end, int) and end >= _FAR else end
        slices[axis] = slice(None if start == 0 else start, last, None if step == 1 else step)
    return call.function(operator.getitem, call.tensor(), tuple(slices))


def _reversed(call: Call, starts: list[Size], ends: list[Size], axes: list[int], steps: list[int]) -> Value:
    """A slice of step -1 over whole dimensions."""
    whole = all(_is_whole(call, *each) for each in zip(starts, ends, axes, strict=True))
    if not whole or any(step != -1 for step in steps):
        call.fail("a slice with negative steps that is not a whole dimension reversed")
    return call.function(torch.flip, call.tensor(), tuple(axes))


def _is_whole(call: Call, start: Size, end: Size, axis: int) -> bool:
    """Whether a slice of step -1 goes from the last element to the first: its ends may lie beyond them."""
    size = (call.shape() or {axis: None})[axis]
    if not isinstance(start, int) or not isinstance(end, int):
        return False
    far = _FAR if size is None else size
    return (start == -1 or start >= far - 1) and end < -far


def _ends(call: Call, index: int, name: str) -> list[Size]:
    if name in call.node.attributes:
        return list(call.attribute(name))
    return list(call.sizes(index, name).items)


def gather(call: Call) -> Value:
    """``Gather``: of sizes, one slice, rows of a table, or any index; an embedding takes no index from the end."""
    axis = call.attribute("axis", 0)
    if isinstance(call.value(0), Sizes):
        items, chosen = call.sizes(0, "input").items, call.constant(1, "index")
        return Sizes(tuple(items[int(i)] for i in chosen.flatten()), scalar=chosen.dim() == 0)
    index = call.value(1)
    if isinstance(index, Tensor) and index.dim() == 0:
        return call.function(torch.select, call.tensor(), axis, int(index))
    if axis < 0:
        axis += call.rank()
    table = call.value(0)
    if (
        isinstance(table, Tensor)
        and axis == 0
        and table.dim() == 2
        and isinstance(index, Tensor)
        and (index >= 0).all()
    ):
        return call.function(F.embedding, call.tensor(1), call.tensor(0))
    return call.function(operator.getitem, call.tensor(), (*[slice(None)] * axis, call.tensor(1)))


def expand(call: Call) -> Value:
    """``Expand``: a target size of 1 keeps the size there is."""
    rank = call.rank()
    target: list[Size] = list(call.sizes(1, "shape").items)
    target = [*[1] * (rank - len(target)), *target]
    kept = [-1 if size == 1 and axis >= len(target) - rank else size for axis, size in enumerate(target)]
    return call.method("expand", call.tensor(), *kept)


def tile(call: Call) -> Value:
    """``Tile``."""
    return call.method("repeat", call.tensor(), *call.sizes(1, "repeats").items)


def constant_of_shape(call: Call) -> Value:
    """``ConstantOfShape`` of a shape that is computed."""
    given: Any = call.attribute("value")
    value = torch.zeros(1) if given is None else as_tensor(given.numpy())
    return call.function(torch.full, call.sizes(0, "shape").items, value.item(), dtype=value.dtype)


def size(call: Call) -> Value:
    """``Size``: the number of elements."""
    known = call.shape()
    if known is None or None in known:
        return Sizes((call.method("numel", call.tensor()),), scalar=True)
    return Sizes((math.prod(item for item in known if item is not None),), scalar=True)


RULES: Rules = {
    "Shape": shape,
    "Size": size,
    "Reshape": reshape,
    "Flatten": flatten,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Transpose": transpose,
    "Concat": concat,
    "Split": split,
    "Slice": cut,
    "Gather": gather,
    "Expand": expand,
    "Tile": tile,
    "ConstantOfShape": constant_of_shape,
}
