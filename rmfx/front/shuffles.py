"""Recognises the shuffle of channels that is written as a reshape, a transposition and a reshape back."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from rmfx.front.calls import argument, literal, sizes_of_call
from rmfx.front.install import Installer
from rmfx.front.kind_table import KindTable
from rmfx.front.opnames import op_name

_VIEWS = frozenset({"view", "reshape"})


def spell_shuffle(node: fx.Node, installer: Installer, kinds: KindTable) -> bool:
    """Make ``x.view(b, g, c // g, h, w).transpose(1, 2).reshape(b, c, h, w)`` an ``nn.ChannelShuffle(g)``.

    Returns:
        Whether ``node``, the reshape back, was changed.
    """
    turned = _above(node) if op_name(node) in _VIEWS or _is_flatten(node) else None
    while turned is not None and op_name(turned) == "contiguous":
        turned = _above(turned)
    if turned is None or not _swaps_groups(turned):
        return False
    split = _above(turned)
    if split is None or op_name(split) not in {*_VIEWS, "unflatten"}:
        return False
    source = _above(split)
    if source is None or (kinds[source].rank or 0) < 3 or not kinds[source].channels:
        return False
    groups = group_count(split, source, kinds)
    if groups is None or not _restores(node, source, kinds):
        return False
    installer.layer(node, nn.ChannelShuffle(groups), source)
    return True


def _above(node: fx.Node) -> fx.Node | None:
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def _is_flatten(node: fx.Node) -> bool:
    if node.op == "call_module":
        module = node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]
        return isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, 2)
    return op_name(node) == "flatten" and (argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)) == (
        1,
        2,
    )


def _swaps_groups(node: fx.Node) -> bool:
    name = op_name(node)
    if name in ("transpose", "swapaxes", "swapdims"):
        return {argument(node, 1, "dim0", None), argument(node, 2, "dim1", None)} == {1, 2}
    order = sizes_of_call(node, name="dims") if name == "permute" else ()
    return len(order) > 2 and tuple(order) == (0, 2, 1, *range(3, len(order)))


def group_count(split: fx.Node, source: fx.Node, kinds: KindTable) -> int | None:
    """The number of groups, where ``split`` only takes the channels of ``source``, whose number is known, apart."""
    channels, rank = kinds[source].channels, kinds[source].rank
    assert channels is not None and rank is not None
    if op_name(split) == "unflatten":
        axis, given = argument(split, 1, "dim", None), argument(split, 2, "sizes", ())
        sizes: tuple[Any, ...] = (None, *given) if axis == 1 else ()
        rest = True
    else:
        sizes = sizes_of_call(split)
        rest = len(sizes) == rank + 1 and _keeps(sizes[0], source, 0, kinds) and _keep_places(sizes[3:], source, kinds)
    if len(sizes) < 3 or not rest:
        return None
    groups, width = (literal(size, kinds.kinds) for size in sizes[1:3])
    if groups == -1 and width:
        groups = channels // width
    if width == -1 and groups:
        width = channels // groups
    return groups if groups and width and groups > 0 and groups * width == channels else None


def _restores(node: fx.Node, source: fx.Node, kinds: KindTable) -> bool:
    if op_name(node) not in _VIEWS:
        return True
    sizes = sizes_of_call(node)
    if len(sizes) != kinds[source].rank:
        return len(sizes) == 1 and _is_shape_of(sizes[0], source)
    whole = literal(sizes[1], kinds.kinds) in (-1, kinds[source].channels)
    return whole and _keeps(sizes[0], source, 0, kinds) and _keep_places(sizes[2:], source, kinds)


def _keep_places(sizes: tuple[Any, ...], source: fx.Node, kinds: KindTable) -> bool:
    return all(_keeps(size, source, axis, kinds) for axis, size in enumerate(sizes, start=2))


def _keeps(size: Any, source: fx.Node, axis: int, kinds: KindTable) -> bool:
    """Whether ``size`` is the size of ``source`` along ``axis``; a batch of -1 is what is left."""
    shape = source.meta.get("shape")
    if type(size) is int:
        return size == -1 or (shape is not None and shape[axis] == size)
    if not isinstance(size, fx.Node):
        return False
    read = size_read(size)
    if read is None or read[1] not in (axis, axis - (kinds[source].rank or 0)):
        return False
    theirs = read[0].meta.get("shape")
    return read[0] is source or (shape is not None and theirs is not None and theirs[axis] == shape[axis])


def _is_shape_of(size: Any, source: fx.Node) -> bool:
    if not isinstance(size, fx.Node):
        return False
    return (size.target is getattr and size.args == (source, "shape")) or (
        size.op == "call_method" and size.target == "size" and size.args == (source,) and not size.kwargs
    )


def size_read(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The tensor and the axis whose size ``node`` reads: ``x.size(0)``, ``x.shape[0]``, ``x.size()[0]``."""
    source = _above(node)
    if source is None:
        return None
    if node.op == "call_method" and node.target == "size":
        axis = argument(node, 1, "dim", None)
        return (source, axis) if type(axis) is int else None
    if str(getattr(node.target, "__name__", "")) != "getitem" or type(node.args[1]) is not int:
        return None
    tensor = _above(source)
    return (tensor, node.args[1]) if tensor is not None and _is_shape_of(source, tensor) else None
