"""Reads the arguments of the functions and methods that a graph calls."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from rmfx.front.kinds import Kind, Kinds
from rmfx.front.opnames import op_name


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument of a call, by position (the tensor is 0) or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def choice(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """The condition of ``where`` or ``masked_fill``, what is chosen where it holds, and what elsewhere.

    >>> gm = fx.symbolic_trace(lambda x, m: x.masked_fill(m, 0))
    >>> choice(list(gm.graph.nodes)[2])
    (m, 0, x)
    """
    name = op_name(node) if node.op in ("call_function", "call_method") else None
    if name == "masked_fill":
        return argument(node, 1, "mask", None), argument(node, 2, "value", None), argument(node, 0, "input", None)
    if name != "where":
        return None
    places = (1, 0) if node.op == "call_method" else (0, 1)  # x.where(condition, other)
    condition, first = (argument(node, at, word, None) for at, word in zip(places, ("condition", "input"), strict=True))
    return condition, first, argument(node, 2, "other", None)


def literal(value: Any, kinds: Kinds) -> int | None:
    """The whole number that an argument is, where it is one whatever the input."""
    if isinstance(value, fx.Node):
        value = kinds[value].value if value in kinds and not kinds[value].tensor else None
    return value if type(value) is int else None


def is_literal_slice(key: Any) -> TypeGuard[slice]:
    """Whether ``key`` is a slice between numbers."""
    return isinstance(key, slice) and all(part is None or type(part) is int for part in (key.start, key.stop, key.step))


def sizes_of_call(node: fx.Node, start: int = 1, name: str = "shape") -> tuple[Any, ...]:
    """The sizes that a view, reshape or expand is given, as they stand in the graph."""
    given = node.args[start:] or (node.kwargs.get(name, node.kwargs.get("size", ())),)
    return tuple(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else tuple(given)


def permutation(node: fx.Node, rank: int) -> tuple[int, ...] | None:
    """Which axis of its input, of ``rank`` dimensions, each axis of ``node`` is; ``None`` where that is not fixed.

    >>> gm = fx.symbolic_trace(lambda x: x.movedim(1, -1))
    >>> permutation(list(gm.graph.nodes)[1], 4)
    (0, 2, 3, 1)
    """
    if op_name(node) not in PERMUTING or len(node.all_input_nodes) != 1 or not node.args or rank > len(_SIZES):
        return None
    x = torch.empty(_SIZES[:rank], device="meta")
    call: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
    try:
        return tuple(_SIZES.index(size) for size in call(x, *node.args[1:], **node.kwargs).shape)
    except (RuntimeError, IndexError, TypeError):
        return None  # the call fails when it runs, as it always did


def part_lengths(node: fx.Node, source: Kind) -> tuple[int, list[int]] | None:
    """The axis and the lengths of the parts that a split gives, where they are fixed."""
    name = op_name(node)
    given = argument(node, 1, _SPLITS[str(name)], None)
    axis = argument(node, 2, "dim", 0)
    if type(axis) is not int or source.rank is None or not -source.rank <= axis < source.rank:
        return None
    axis %= source.rank
    size = source.sizes[axis]
    if isinstance(given, tuple | list):
        whole = [part for part in given if type(part) is int]
        if len(whole) != len(given):
            return None
        if name == "tensor_split":
            return None
        return axis, whole
    if type(given) is not int or given < 1 or size is None:
        return None
    if name == "tensor_split":
        return axis, [size // given + (index < size % given) for index in range(given)]
    step = given if name.startswith("split") else -(-size // given)  # type: ignore[union-attr]
    return axis, [min(step, size - start) for start in range(0, size, step)]


_SPLITS = {
    "split": "split_size_or_sections",
    "split_with_sizes": "split_sizes",
    "chunk": "chunks",
    "tensor_split": "indices_or_sections",
}
SPLITS = frozenset(_SPLITS)
PERMUTING = frozenset({"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis"})
_SIZES = (2, 3, 5, 7, 11, 13, 17, 19)  # all different, so that the shape of what is permuted tells the order
