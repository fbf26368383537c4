"""The kind of what a function or method gives: fixed sizes followed through slices, splits, reshapes and arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx

from rmfx.front.calls import (
    PERMUTING,
    SPLITS,
    argument,
    is_literal_slice,
    literal,
    part_lengths,
    permutation,
    sizes_of_call,
)
from rmfx.front.kinds import ANY, Kind, Kinds, Sizes, broadcast, flattened, numel
from rmfx.front.layer_kinds import KEEPING
from rmfx.front.opnames import op_name

_NUMBER = Kind(tensor=False)
_BINARY_NAMES = """
    add sub subtract rsub mul multiply div divide truediv true_divide maximum minimum pow where addcmul lerp
"""
_COMPARISONS = frozenset(["eq", "ne", "lt", "le", "gt", "ge"])
_BINARY = frozenset(_BINARY_NAMES.split())
_COUNTING = ("_operator", "math", "builtins")


def function_kind(node: fx.Node, kinds: Kinds, tensor: bool) -> Kind:
    """The kind of a ``call_function`` or ``call_method`` node; ``tensor`` is false for surely no tensor."""
    name = op_name(node) or ("getattr" if node.target is getattr else "")
    if not tensor:
        return replace(_NUMBER, value=_number(node, name, kinds))
    read = [kinds[source] for source in node.all_input_nodes if source in kinds and kinds[source].tensor]
    if not read:
        return ANY
    if name in KEEPING:
        return replace(read[0], value=None)
    if name in _COMPARISONS:
        return replace(broadcast(read), floating=False)
    if name in _BINARY:
        made = broadcast(read)
        return replace(made, floating=made.floating or any(isinstance(arg, float) for arg in node.args))
    if node.target is operator.getitem:
        return _item(node, read[0])
    source = node.args[0] if node.args else node.kwargs.get("input")
    rule = _RULES.get(name)
    if rule is None or (isinstance(source, fx.Node) and source not in kinds):
        return Kind(True, None, read[0].floating) if name in _FLOATS_KEEPING else ANY
    first = kinds[source] if isinstance(source, fx.Node) else read[0]
    return rule(node, first, kinds)


# -- numbers ----------------------------------------------------------------------------------------------------------


def _number(node: fx.Node, name: str, kinds: Kinds) -> Any:
    source = node.args[0] if node.args else None
    kind = kinds.get(source, ANY) if isinstance(source, fx.Node) else ANY
    if name == "getattr" and node.args[1] in ("shape", "ndim"):
        return (kind.sizes if kind.rank is not None else None) if node.args[1] == "shape" else kind.rank
    if name in ("dim", "ndimension"):
        return kind.rank
    if name == "size" and kind.rank is not None:
        axis = argument(node, 1, "dim", None)
        return kind.sizes if axis is None else kind.sizes[axis] if type(axis) is int else None
    if node.target is operator.getitem and isinstance(kind.value, tuple):
        key = node.args[1]
        return kind.value[key] if type(key) is int or is_literal_slice(key) else None
    return _counted(node, kinds) if getattr(node.target, "__module__", None) in _COUNTING else None


def _counted(node: fx.Node, kinds: Kinds) -> Any:
    values = [kinds[arg].value if isinstance(arg, fx.Node) and arg in kinds else arg for arg in node.args]
    if node.kwargs or not callable(node.target) or not all(isinstance(value, bool | int | float) for value in values):
        return None
    try:
        return node.target(*values)
    except (ArithmeticError, TypeError, ValueError):
        return None  # it raises when it runs, as it always did


# -- tensors ----------------------------------------------------------------------------------------------------------


def _item(node: fx.Node, source: Kind) -> Kind:
    key = node.args[1]
    if isinstance(source.value, tuple) and type(key) is int:
        part = source.value[key] if -len(source.value) <= key < len(source.value) else ANY
        return part if isinstance(part, Kind) else ANY
    keys = list(key) if isinstance(key, tuple) else [key]
    plain = all(k is None or k is Ellipsis or type(k) is int or isinstance(k, slice) for k in keys)
    if source.rank is None or not plain:
        return Kind(True, None, source.floating)
    used = sum(k is not None and k is not Ellipsis for k in keys)
    if Ellipsis not in keys:
        keys.append(Ellipsis)
    sizes: list[int | None] = []
    left = list(source.sizes)
    for k in keys:
        if k is None:
            sizes.append(1)
        elif k is Ellipsis:
            whole = source.rank - used
            sizes += left[:whole]
            del left[:whole]
        else:
            size = left.pop(0)
            if isinstance(k, slice):
                fixed = size is not None and is_literal_slice(k)
                sizes.append(len(range(size)[k]) if fixed else size if k == slice(None) else None)  # type: ignore[arg-type]
    return Kind(True, len(sizes), source.floating, tuple(sizes))


def _permuted(node: fx.Node, source: Kind, kinds: Kinds) -> Kind:
    order = None if source.rank is None else permutation(node, source.rank)
    if order is None:
        return Kind(True, source.rank, source.floating)
    return replace(source, sizes=tuple(source.sizes[axis] for axis in order), value=None)


def _viewed(node: fx.Node, source: Kind, kinds: Kinds) -> Kind:
    given = sizes_of_call(node)
    if len(given) == 1 and isinstance(given[0], fx.Node):
        value = kinds[given[0]].value if given[0] in kinds else None
        return Kind(True, len(value), source.floating, value) if isinstance(value, tuple) else ANY
    sizes: Sizes = tuple(literal(size, kinds) for size in given)
    if sizes.count(-1) == 1 and sizes.count(None) == 0:
        total, rest = numel(source.sizes), -(numel(sizes) or 1)
        known = total // rest if total is not None and source.rank and rest else None
        sizes = tuple(known if size == -1 else size for size in sizes)
    return Kind(True, len(sizes), source.floating, tuple(None if size == -1 else size for size in sizes))


def _expanded(node: fx.Node, source: Kind, kinds: Kinds) -> Kind:
    given = sizes_of_call(node, name="size")
    rank = len(given)
    own = (1,) * (rank - len(source.sizes)) + source.sizes if source.rank is not None else (None,) * rank
    wanted = [literal(size, kinds) for size in given]
    pairs = zip(own, wanted, given, strict=True) if len(own) == rank else ()
    sizes = tuple(mine if raw == -1 or mine not in (1, None) else size for mine, size, raw in pairs)
    return Kind(True, rank, source.floating, sizes)


def _like_other(node: fx.Node, source: Kind, kinds: Kinds) -> Kind:
    other = argument(node, 1, "other", None)
    like = kinds.get(other, ANY) if isinstance(other, fx.Node) else ANY
    return Kind(True, like.rank, source.floating, like.sizes)


def _flat(node: fx.Node, source: Kind, kinds: Kinds) -> Kind:
    first, last = argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)
    return flattened(source, first, last) if type(first) is int and type(last) is int else ANY


def _concatenated(node: fx.Node, source: Kind, kinds: Kinds) -> Kind:
    tensors = argument(node, 0, "tensors", ())
    axis = argument(node, 1, "dim", 0)
    if not isinstance(tensors, tuple | list) or type(axis) is not int:
        return ANY
    read = [kinds.get(part, ANY) for part in tensors if isinstance(part, fx.Node)]
    rank = next((kind.rank for kind in read if kind.rank), None)
    floating = any(kind.floating for kind in read)
    if not rank or any(kind.rank not in (None, rank) for kind in read):
        return Kind(True, None, floating)
    read = [kind if kind.rank else Kind(True, rank) for kind in read]
    merged = [next((kind.sizes[i] for kind in read if kind.sizes[i] is not None), None) for i in range(rank)]
    parts = [kind.sizes[axis] for kind in read]
    whole = None if None in parts or len(read) != len(tensors) else sum(part for part in parts if part is not None)
    return Kind(True, rank, floating, tuple(merged)).with_size(axis, whole)


def _parts(node: fx.Node, source: Kind, kinds: Kinds) -> Kind:
    from_call = part_lengths(node, source)
    if from_call is None or source.rank is None:
        return Kind(True, None, source.floating)
    axis, lengths = from_call
    return Kind(True, None, source.floating, value=tuple(source.with_size(axis, length) for length in lengths))


def _stacked(node: fx.Node, source: Kind, kinds: Kinds) -> Kind:
    parts, axis = argument(node, 0, "tensors", ()), argument(node, 1, "dim", 0)
    read = [kinds.get(part, ANY) for part in parts if isinstance(part, fx.Node)]
    rank = read[0].rank if read else None
    if rank is None or type(axis) is not int or any(kind.rank != rank for kind in read):
        return ANY
    merged = [next((kind.sizes[i] for kind in read if kind.sizes[i] is not None), None) for i in range(rank)]
    axis %= rank + 1
    sizes = (*merged[:axis], len(parts), *merged[axis:])
    return Kind(True, rank + 1, any(kind.floating for kind in read), sizes)


def _narrowed(node: fx.Node, source: Kind, kinds: Kinds) -> Kind:
    axis, length = argument(node, 1, "dim", None), argument(node, 3, "length", None)
    if source.rank is None or type(axis) is not int:
        return Kind(True, source.rank, source.floating)
    return source.with_size(axis, literal(length, kinds))


def _reduced(node: fx.Node, source: Kind, kinds: Kinds) -> Kind:
    axes, keep = argument(node, 1, "dim", None), argument(node, 2, "keepdim", False)
    axes = (axes,) if type(axes) is int else axes
    if source.rank is None or not isinstance(axes, tuple | list) or not all(type(axis) is int for axis in axes):
        return Kind(True, None, source.floating)
    gone = {axis % source.rank for axis in axes}
    kept = [1 if i in gone else size for i, size in enumerate(source.sizes) if keep or i not in gone]
    return Kind(True, len(kept), source.floating, tuple(kept))


def _squeezed(node: fx.Node, source: Kind, kinds: Kinds) -> Kind:
    axis = argument(node, 1, "dim", None)
    if source.rank is None or type(axis) is not int or source.sizes[axis] != 1:
        return Kind(True, None, source.floating)
    axis %= source.rank
    return Kind(True, source.rank - 1, source.floating, (*source.sizes[:axis], *source.sizes[axis + 1 :]))


def _unsqueezed(node: fx.Node, source: Kind, kinds: Kinds) -> Kind:
    axis = argument(node, 1, "dim", None)
    if source.rank is None or type(axis) is not int:
        return Kind(True, None, source.floating)
    axis %= source.rank + 1
    return Kind(True, source.rank + 1, source.floating, (*source.sizes[:axis], 1, *source.sizes[axis:]))


def _resized(node: fx.Node, source: Kind, kinds: Kinds) -> Kind:
    return replace(source, sizes=(*source.sizes[:2], *(None,) * (len(source.sizes) - 2)), value=None)


def _padded(node: fx.Node, source: Kind, kinds: Kinds) -> Kind:
    widths = argument(node, 1, "pad", ())
    spatial = isinstance(widths, tuple | list) and len(widths) <= 2 * (len(source.sizes) - 2)
    return _resized(node, source, kinds) if spatial else Kind(True, source.rank, source.floating)


_FLOATS_KEEPING = frozenset({"einsum", "matmul", "bmm", "mm"})
_Rule = Callable[[fx.Node, Kind, Kinds], Kind]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(PERMUTING, _permuted),
    **dict.fromkeys(("view", "reshape"), _viewed),
    **dict.fromkeys(("expand", "broadcast_to"), _expanded),
    **dict.fromkeys(("expand_as", "view_as", "reshape_as"), _like_other),
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenated),
    **dict.fromkeys(SPLITS, _parts),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "std", "var", "norm"), _reduced),
    "interpolate": _resized,
    "pad": _padded,
    "flatten": _flat,
    "narrow": _narrowed,
    "stack": _stacked,
    "squeeze": _squeezed,
    "unsqueeze": _unsqueezed,
}
