"""A slice that lies within one operand of a concat is a slice of that operand, or the operand itself.

torch.cat([x, y], 1)[:, :3]   =>   x[:, :3], and x where it has 3 channels

So ``a, b = cat([x, f(x)], 1).chunk(2, 1); a + b`` is the residual sum that it is, and no concat stands there.
"""

from __future__ import annotations

import torch
from torch import fx

from rmfx.front.kind_table import KindTable


def within_operand(source: fx.Node, axis: int, start: int, length: int, kinds: KindTable) -> tuple[fx.Node, int]:
    """What holds positions ``start`` to ``start + length - 1`` of ``source``, and where they begin in it.

    Args:
        source: the tensor that is sliced; concats of it are in normal form.
        axis: of the slice, counted from the front.
        start, length: within the size of ``source`` there.
        kinds: what is known of each node.
    """
    while source.target is torch.cat and source.args[1] == axis and (operands := _of_one_type(source, kinds)):
        found = _operand(operands, axis, start, length, kinds)
        if found is None:
            break
        source, start = found
    return source, start


def _of_one_type(cat: fx.Node, kinds: KindTable) -> tuple[fx.Node, ...]:
    """The operands of a concat that changes the type of none of them; empty where it may."""
    operands: tuple[fx.Node, ...] = cat.args[0]  # type: ignore[assignment]
    dtypes = {operand.meta.get("dtype") for operand in operands}
    return operands if len(dtypes) == 1 and all(kinds[operand].floating for operand in operands) else ()


def _operand(
    operands: tuple[fx.Node, ...], axis: int, start: int, length: int, kinds: KindTable
) -> tuple[fx.Node, int] | None:
    for operand in operands:
        size = kinds[operand].sizes[axis] if kinds[operand].rank else None
        if size is None:
            return None
        if start < size:
            return (operand, start) if start + length <= size else None
        start -= size
    return None
