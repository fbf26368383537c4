"""One spelling for what picks, adds and joins channels, for samples in space, and for what broadcasts.

``x[:, 2:5]``, ``x.narrow(1, 2, 3)`` and the parts of ``split``, ``chunk`` and ``tensor_split`` become
:class:`rmfx.modules.ChannelSlice`; ``F.pad`` on channels and ``cat`` with zeros become
:class:`rmfx.modules.ChannelPad`; ``torch.cat`` has a dimension counted from the front. Only where the number of
channels is fixed by the network, so that the layer means the same for every input. ``x[:, :, ::2, ::2]``, the shortcut
of ResNet's option A, becomes the max-pool of one position that it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from rmfx.front.calls import SPLITS, argument, literal, part_lengths, sizes_of_call
from rmfx.front.install import Installer
from rmfx.front.joined import within_operand
from rmfx.front.kind_table import KindTable
from rmfx.front.opnames import op_name
from rmfx.modules import ChannelPad, ChannelSlice

_CATS = frozenset({"cat", "concat", "concatenate"})
_ZEROS = frozenset({"zeros", "new_zeros"})
_SAMPLES: dict[int, type[nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_EXPANDING = frozenset({"expand", "expand_as", "broadcast_to"})


class Channels:
    """Spells the channel operations of one graph.

    Args:
        installer: puts the new layers in place.
        kinds: what is known of each node.
    """

    def __init__(self, installer: Installer, kinds: KindTable) -> None:
        self.installer, self.kinds = installer, kinds
        self._parts: dict[tuple[fx.Node, int], fx.Node] = {}

    def rewrite(self, node: fx.Node) -> bool:
        """Spell ``node`` in normal form; returns whether it was changed."""
        if node.op not in ("call_function", "call_method"):
            return False
        name = op_name(node)
        if node.target is operator.getitem:
            whole = node.args[0]
            if isinstance(whole, fx.Node) and op_name(whole) in SPLITS:
                return self._part(node, whole)
            return self._slice(node) or self._sample(node)
        if name == "narrow":
            return self._narrow(node)
        if name == "pad":
            return self._pad(node)
        return name in _CATS and self._cat(node)

    # -- slices -------------------------------------------------------------------------------------------------------

    def _part(self, node: fx.Node, whole: fx.Node) -> bool:
        source, index = argument(whole, 0, "input", argument(whole, 0, "tensor", None)), node.args[1]
        if not isinstance(source, fx.Node) or type(index) is not int:
            return False
        lengths = part_lengths(whole, self.kinds[source])
        if lengths is None or not -len(lengths[1]) <= index < len(lengths[1]):
            return False
        index %= len(lengths[1])
        if (whole, index) in self._parts:
            node.replace_all_uses_with(self._parts[whole, index])
            return True
        changed = self._install(node, source, lengths[0], sum(lengths[1][:index]), lengths[1][index])
        if node.users:  # else it was another node, which its readers read by now
            self._parts[whole, index] = node
        return changed

    def _slice(self, node: fx.Node) -> bool:
        source, key = node.args
        found = _only_slice(key, self.kinds[source].rank) if isinstance(source, fx.Node) else None
        if found is None or not isinstance(source, fx.Node):
            return False
        axis, part = found
        size = self.kinds[source].sizes[axis]
        bounds = (part.start, part.stop, part.step)
        if size is None or not all(bound is None or type(bound) is int for bound in bounds):
            return False
        reach = range(size)[part]
        return reach.step == 1 and self._install(node, source, axis, reach.start, len(reach))

    def _sample(self, node: fx.Node) -> bool:
        """``x[:, :, ::s, ::t]``, every s-th row and t-th column."""
        source, key = node.args
        if not isinstance(source, fx.Node):
            return False
        rank, dtype = self.kinds[source].rank, node.meta.get("dtype", torch.float32)
        found = cuts(key, rank)
        if not found or rank is None or rank - 2 not in _SAMPLES or not dtype.is_floating_point:
            return False
        strides = {axis: part.step for axis, part in found if part.start in (None, 0) and part.stop is None}
        if len(strides) < len(found) or min(strides) < 2 or not all(type(step) is int for step in strides.values()):
            return False
        stride = tuple(strides.get(axis, 1) for axis in range(2, rank))
        if min(stride) < 1:
            return False
        self.installer.layer(node, _SAMPLES[rank - 2](1, stride), source)
        return True

    def _narrow(self, node: fx.Node) -> bool:
        source, axis = node.args[0] if node.args else None, argument(node, 1, "dim", None)
        start = literal(argument(node, 2, "start", None), self.kinds.kinds)
        length = literal(argument(node, 3, "length", None), self.kinds.kinds)
        if not isinstance(source, fx.Node) or type(axis) is not int or start is None or length is None:
            return False
        kind = self.kinds[source]
        size = kind.sizes[axis] if kind.rank and -kind.rank <= axis < kind.rank else None
        if size is None:
            return False
        return self._install(node, source, axis, start % size if start < 0 else start, length)

    def _install(self, node: fx.Node, source: fx.Node, axis: int, start: int, length: int) -> bool:
        kind = self.kinds[source]
        assert kind.rank is not None
        named = _channel_axis(axis, kind.rank)
        size = kind.sizes[axis]
        if named is None or length < 1 or size is None or start + length > size:
            return False
        source, start = within_operand(source, axis % kind.rank, start, length, self.kinds)
        if length == self.kinds[source].sizes[axis]:
            node.replace_all_uses_with(source)
        else:
            self.installer.layer(node, ChannelSlice(start, length, named), source)
        return True

    # -- zero channels ------------------------------------------------------------------------------------------------

    def _pad(self, node: fx.Node) -> bool:
        source, widths = argument(node, 0, "input", None), argument(node, 1, "pad", ())
        mode, value = argument(node, 2, "mode", "constant"), argument(node, 3, "value", None)
        if not isinstance(source, fx.Node) or mode != "constant" or value not in (None, 0):
            return False
        rank = self.kinds[source].rank
        whole = isinstance(widths, tuple | list) and all(type(width) is int for width in widths)
        if rank is None or not whole or len(widths) % 2 or len(widths) > 2 * rank:
            return False
        sides = {rank - 1 - i // 2: (widths[i], widths[i + 1]) for i in range(0, len(widths), 2)}
        wide = {axis: side for axis, side in sides.items() if side != (0, 0)}
        if not wide:
            node.replace_all_uses_with(source)
            return True
        axis = next(iter(wide))
        named = _channel_axis(axis, rank)
        if len(wide) > 1 or named is None or (named == -1 and rank > 2) or min(wide[axis]) < 0:
            return False
        self.installer.layer(node, ChannelPad(*wide[axis], named), source)
        return True

    # -- concatenation ------------------------------------------------------------------------------------------------

    def _cat(self, node: fx.Node) -> bool:
        parts, axis = argument(node, 0, "tensors", ()), argument(node, 1, "dim", 0)
        if not isinstance(parts, tuple | list) or type(axis) is not int or "out" in node.kwargs:
            return False
        nodes = [part for part in parts if isinstance(part, fx.Node)]
        if not nodes or len(nodes) != len(parts):
            return False
        rank = next((self.kinds[part].rank for part in nodes if self.kinds[part].rank), None)
        if len(nodes) == 1:
            node.replace_all_uses_with(nodes[0])
            return True
        if rank is None and axis < 0:
            return False
        axis = axis if axis >= 0 or rank is None else axis + rank
        if rank is not None and self._cat_with_zeros(node, nodes, axis, rank):
            return True
        node.op, node.target, node.args, node.kwargs = "call_function", torch.cat, (tuple(nodes), axis), {}
        return True

    def _cat_with_zeros(self, node: fx.Node, parts: list[fx.Node], axis: int, rank: int) -> bool:
        zeros = [self._zero_channels(part, axis) for part in parts]
        real = [index for index, count in enumerate(zeros) if count is None]
        named = _channel_axis(axis, rank)
        if len(real) != 1 or named is None:
            return False
        index = real[0]
        same = node.meta.get("dtype") == parts[index].meta.get("dtype") and "dtype" in node.meta
        if not same and not all(_takes_dtype(part) for part in parts if part is not parts[index]):
            return False  # zeros of a wider type would change the type of the result
        before, after = (sum(count or 0 for count in some) for some in (zeros[:index], zeros[index:]))
        self.installer.layer(node, ChannelPad(before, after, named), parts[index])
        return True

    def _zero_channels(self, node: fx.Node, axis: int) -> int | None:
        """How many channels of zeros ``node`` is, or ``None`` where it may be something else."""
        name = op_name(node)
        if name == "zeros_like" and isinstance(node.args[0], fx.Node):
            kind = self.kinds[node.args[0]]
            return kind.sizes[axis] if kind.rank else None
        if name not in _ZEROS:
            return None
        given = sizes_of_call(node, int(name == "new_zeros"), "size")
        return literal(given[axis], self.kinds.kinds) if axis < len(given) else None


def _takes_dtype(node: fx.Node) -> bool:
    return op_name(node) in ("zeros_like", "new_zeros") and "dtype" not in node.kwargs


def _channel_axis(axis: int, rank: int) -> int | None:
    """How a layer names the axis: 1, or -1 for features; ``None`` where it is neither."""
    axis %= rank
    if axis == 1 and rank > 2:
        return 1
    return -1 if axis == rank - 1 and rank > 1 else None


def _only_slice(key: Any, rank: int | None) -> tuple[int, slice] | None:
    """The one axis that an index cuts, and how; ``None`` where it does anything else."""
    found = cuts(key, rank)
    return found[0] if found and len(found) == 1 else None


def cuts(key: Any, rank: int | None) -> list[tuple[int, slice]] | None:
    """The axes that an index cuts, and how; ``None`` where it does more than slicing."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if rank is None or not all(k is Ellipsis or isinstance(k, slice) for k in keys) or keys.count(Ellipsis) > 1:
        return None
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        keys[at : at + 1] = [slice(None)] * (rank - len(keys) + 1)
    found = [(axis, k) for axis, k in enumerate(keys) if k != slice(None)]
    return found if all(axis < rank for axis, _ in found) else None


def drop_expansion(node: fx.Node, kinds: KindTable) -> None:
    """Let a sum or product of two tensors read an operand before it is expanded, where it is broadcast just so."""
    for here, there in ((0, 1), (1, 0)):
        wide, other = node.args[here], node.args[there]
        if not isinstance(wide, fx.Node) or not isinstance(other, fx.Node) or op_name(wide) not in _EXPANDING:
            continue
        narrow = wide.args[0]
        if isinstance(narrow, fx.Node) and _broadcasts(wide, narrow, other, kinds):
            node.update_arg(here, narrow)


def _broadcasts(wide: fx.Node, narrow: fx.Node, other: fx.Node, kinds: KindTable) -> bool:
    if op_name(wide) == "expand_as" and argument(wide, 1, "other", None) is other:
        return True
    shapes = [node.meta.get("shape") for node in (wide, narrow, other)]
    if all(shape is not None for shape in shapes):
        return torch.broadcast_shapes(shapes[1], shapes[2]) == torch.broadcast_shapes(shapes[0], shapes[2])
    return False
