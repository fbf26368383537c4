"""A slice that lies within one operand of a concat is a slice of that operand, or the operand itself.

torch.cat([x, y], 1)[:, :3]   =>   x[:, :3], and x where it has 3 channels

So ``a, b = cat([x, f(x)], 1).chunk(2, 1); a + b`` is the residual sum that it is, and no concat stands there. A concat
that others read as a whole stays, and its slices with it: so each block of a chain that carries some of its channels is
removed by itself.
"""

from __future__ import annotations

import torch
from torch import fx

from rmfx.front.kind_table import KindTable
from rmfx.front.opnames import METADATA, SPLITS, op_name
from rmfx.modules import ChannelSlice

# What reads parts: the last bring groups of channels apart, or a sum over them (rmfx.front.grouped).
_CUTTING = METADATA | SPLITS | {"getitem", "narrow", "view", "reshape", "unflatten"}


def within_operand(source: fx.Node, axis: int, start: int, length: int, kinds: KindTable) -> tuple[fx.Node, int]:
    """What holds positions ``start`` to ``start + length - 1`` of ``source``, and where they begin in it.

    Args:
        source: the tensor that is sliced; concats of it are in normal form.
        axis: of the slice, counted from the front.
        start, length: within the size of ``source`` there.
        kinds: what is known of each node.
    """
    while source.target is torch.cat and source.args[1] == axis and _is_only_cut(source, kinds):
        found = _operand(_of_one_type(source, kinds), axis, start, length, kinds)
        if found is None:
            break
        source, start = found
    return source, start


def _is_only_cut(cat: fx.Node, kinds: KindTable) -> bool:
    """Whether nobody reads a concat as a whole."""
    return all(_cuts(user, kinds) or (user.target is torch.cat and _is_only_cut(user, kinds)) for user in cat.users)


def _cuts(reader: fx.Node, kinds: KindTable) -> bool:
    if reader.op == "call_module":
        return isinstance(kinds.gm.get_submodule(str(reader.target)), ChannelSlice)
    return reader.target is getattr or op_name(reader) in _CUTTING


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
