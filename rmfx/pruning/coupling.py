"""Which channels of a network can only go together: one set for each channel that is chosen by itself.

Every node's channel axis is a list of *sets*. A layer that mixes channels starts new sets; all else passes on, joins or
rearranges those it reads: a sum or product joins the sets of its operands channel by channel, a depthwise convolution
keeps them, a concat puts them side by side. So in a plain network every layer's channels are their own, in a residual
one those of a whole stage hang together, and neither case is written down here.

Groups of a convolution stay equally wide: the channels at one place of every group are one set. A set that something
reads that is no such layer, or that leaves the network, is fixed, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.pointwise import is_per_channel, is_pointwise
from rmfx.graph.bounds import keeps_channels
from rmfx.graph.facts import ZERO_PADDING, is_plain, is_product, is_sum, module_of, shape_of, values_read
from rmfx.graph.linear import CONVS, PER_CHANNEL
from rmfx.graph.spatial import ADAPTIVE, AVERAGES
from rmfx.modules import DROPOUTS, ChannelAffine, ChannelPad, ChannelSlice, FeatureNorm


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of a node's value.

    Attributes:
        axis: which dimension they are.
        sets: the set of each channel, int64 ``[C]``.
    """

    axis: int
    sets: Tensor


@dataclass(frozen=True, eq=False)
class Coupling:
    """All sets of a network.

    Attributes:
        count: how many sets there are; they are numbered from 0.
        channels: of every node whose channels are known.
        fixed: why a set cannot go, for those that cannot.
    """

    count: int
    channels: Mapping[fx.Node, Channels]
    fixed: Mapping[int, str]

    @property
    def free(self) -> Tensor:
        """Which sets may go, bool ``[count]``."""
        free = torch.ones(self.count, dtype=torch.bool)
        free[list(self.fixed)] = False
        return free


def is_group_wise(node: fx.Node) -> bool:
    """Whether each input channel of a convolution has outputs of its own: a depthwise one, with any multiplier."""
    module = module_of(node)
    return isinstance(module, CONVS) and module.groups == module.in_channels > 1


def is_spatial_mean(node: fx.Node) -> bool:
    """Whether the node averages over all dimensions behind the channels: ``x.mean([2, 3])``."""
    if node.target not in ("mean", torch.mean) or len(node.all_input_nodes) != 1:
        return False
    dims, shape = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"), shape_of(node.all_input_nodes[0])
    if shape is None or not isinstance(dims, (list, tuple)):
        return False
    return sorted(dim % len(shape) for dim in dims if isinstance(dim, int)) == [*range(2, len(shape))]


def parts_of(node: fx.Node) -> list[fx.Node]:
    """The operands of a concat, in order; one may stand there more than once."""
    parts = node.args[0]
    return [part for part in parts if isinstance(part, fx.Node)] if isinstance(parts, (list, tuple)) else []


def couple(gm: fx.GraphModule) -> Coupling:
    """The sets of a network.

    Args:
        gm: in normal form, with shapes.

    >>> from rmfx.prepare import prepare
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)).eval()
    >>> coupling = couple(prepare(net, torch.zeros(1, 3, 8, 8), {}).gm)
    >>> int(coupling.free.sum()), sorted(set(coupling.fixed.values()))
    (4, ['it is an input of the network', 'it is an output of the network'])
    """
    reader = _Reader()
    for node in gm.graph.nodes:
        reader.read(node)
    return reader.finish()


class _Reader:
    """Sets under construction: a forest of numbers, of which the roots are sets."""

    def __init__(self) -> None:
        self._parents: list[int] = []
        self._channels: dict[fx.Node, Channels] = {}
        self._reasons: dict[int, str] = {}

    def read(self, node: fx.Node) -> None:
        """Give the node's channels their sets; sources come before their readers."""
        if node.op == "output":
            for source in node.all_input_nodes:
                self._fix(source, "it is an output of the network")
            return
        if is_plain(node) or shape_of(node) is None:
            for source in node.all_input_nodes:
                self._fix(source, f"{node.name} reads more of it than its values")
            return
        found = self._derived(node)
        if found is None:
            for source in values_read(node):
                self._fix(source, f"{node.name} ({_kind(node)}) does not treat channels one by one")
            found = self._given(node)
        if found is not None:
            self._channels[node] = found

    def finish(self) -> Coupling:
        """The sets, numbered in the order of their first channels."""
        numbers: dict[int, int] = {}
        channels = {}
        for node, found in self._channels.items():
            roots = [self._root(number) for number in found.sets.tolist()]
            sets = [numbers.setdefault(root, len(numbers)) for root in roots]
            channels[node] = Channels(found.axis, torch.tensor(sets, dtype=torch.int64))
        fixed = {numbers[self._root(number)]: reason for number, reason in reversed(self._reasons.items())}
        return Coupling(len(numbers), channels, fixed)

    def _derived(self, node: fx.Node) -> Channels | None:
        """The channels of a node that treats them one by one, or mixes them; else ``None``."""
        if is_sum(node) or is_product(node):
            return self._joined(node)
        if node.target is torch.cat:
            return self._side_by_side(node)
        module = module_of(node)
        if is_spatial_mean(node):
            return self._channels.get(node.all_input_nodes[0])
        if module is None or len(node.all_input_nodes) != 1:
            return None
        shape, source = shape_of(node), self._channels.get(node.all_input_nodes[0])
        assert shape is not None
        if isinstance(module, (*CONVS, nn.Linear)):
            return self._mixed(module, source, len(shape))
        if source is None:
            return None
        if isinstance(module, nn.Flatten):
            return _flattened(node, module, source)
        if isinstance(module, ChannelSlice | ChannelPad | nn.ChannelShuffle):
            return self._rearranged(module, source, len(shape))
        return source if _acts_on_each(module, source.axis, len(shape)) else None

    def _mixed(self, module: nn.Module, source: Channels | None, rank: int) -> Channels | None:
        """A layer's outputs; sets of its inputs are tied where its groups demand it."""
        axis = rank - 1 if isinstance(module, nn.Linear) else 1
        if source is not None and source.axis != axis:
            return None
        if isinstance(module, nn.Linear):
            return Channels(axis, self._fresh(module.out_features))
        assert isinstance(module, CONVS)
        if module.groups == module.in_channels > 1 and source is not None:
            return Channels(axis, source.sets.repeat_interleave(module.out_channels // module.in_channels))
        outputs = self._fresh(module.out_channels)
        for sets in (outputs,) if source is None else (outputs, source.sets):
            self._tie(sets.reshape(module.groups, -1))
        return Channels(axis, outputs)

    def _joined(self, node: fx.Node) -> Channels | None:
        """Operands channel by channel; one that is the same for all channels stays as wide as it is."""
        shape = shape_of(node)
        assert shape is not None
        found: Channels | None = None
        opaque: list[torch.Size] = []
        for source in dict.fromkeys(node.all_input_nodes):
            given, size = shape_of(source), self._channels.get(source)
            if given is None:
                return None
            if size is None:
                opaque.append(given)
                continue
            axis = size.axis + len(shape) - len(given)
            if given[size.axis] != shape[axis]:
                self._fix(source, f"{node.name} spreads it over all channels")
                continue
            if found is not None:
                if found.axis != axis:
                    return None
                self._tie(torch.stack([found.sets, size.sets]))
            found = Channels(axis, size.sets)
        if found is None:
            return None
        at = found.axis - len(shape)  # from the end, where shapes are aligned
        return found if all(len(given) < -at or given[at] == 1 for given in opaque) else None

    def _side_by_side(self, node: fx.Node) -> Channels | None:
        """Operands of a concat; the channels of one that is not understood stay, and the others' are their own."""
        operands, shape = parts_of(node), shape_of(node)
        assert shape is not None
        given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        axes = {found.axis for source in operands if (found := self._channels.get(source)) is not None}
        if not isinstance(given, int) or len(axes) != 1 or any(shape_of(source) is None for source in operands):
            return None
        [axis] = axes
        for source in operands:
            if source not in self._channels:
                self._stay(source, axis, f"{source.name} ({_kind(source)}) does not treat channels one by one")
        parts = [self._channels[source].sets for source in operands]
        if given % len(shape) == axis:
            return Channels(axis, torch.cat(parts))
        self._tie(torch.stack(parts))
        return Channels(axis, parts[0])

    def _rearranged(
        self, module: ChannelSlice | ChannelPad | nn.ChannelShuffle, source: Channels, rank: int
    ) -> Channels | None:
        sets = source.sets
        if isinstance(module, nn.ChannelShuffle):
            if source.axis != 1:
                return None
            blocks = sets.reshape(int(module.groups), -1)
            self._tie(blocks)  # so that what is left of a shuffle is one
            return Channels(1, blocks.t().reshape(-1))
        if module.axis % rank != source.axis:
            return source
        if isinstance(module, ChannelPad):
            return Channels(source.axis, torch.cat([self._fresh(module.before), sets, self._fresh(module.after)]))
        return Channels(source.axis, sets[module.start : module.start + module.length])

    def _given(self, node: fx.Node) -> Channels | None:
        """The channels of an input of the network, where its rank tells which axis they are; they stay."""
        if node.op == "placeholder" and len(shape_of(node) or ()) in (2, 4, 5):
            self._stay(node, 1, "it is an input of the network")
        return self._channels.get(node)

    def _stay(self, node: fx.Node, axis: int, reason: str) -> None:
        if (shape := shape_of(node)) is not None:
            self._channels[node] = Channels(axis, self._fresh(shape[axis]))
            self._fix(node, reason)

    def _fix(self, node: fx.Node, reason: str) -> None:
        if (found := self._channels.get(node)) is not None:
            self._reasons |= dict.fromkeys(found.sets.tolist(), reason)

    def _fresh(self, count: int) -> Tensor:
        begin = len(self._parents)
        self._parents += range(begin, begin + count)
        return torch.arange(begin, begin + count)

    def _tie(self, rows: Tensor) -> None:
        """All rows are the same sets."""
        first, *others = rows.tolist()
        for other in others:
            for a, b in zip(first, other, strict=True):
                self._parents[self._root(b)] = self._root(a)

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number


def _acts_on_each(module: nn.Module, axis: int, rank: int) -> bool:
    """Whether the layer treats the channels on ``axis`` one by one, and knows them by that axis."""
    if isinstance(module, DROPOUTS):
        return True
    if isinstance(module, FeatureNorm):
        return axis == rank - 1
    if isinstance(module, ChannelAffine):
        return not module.weight.dim() or module.axis % rank == axis
    if type(module) in PER_CHANNEL:
        return axis == 1
    if is_pointwise(module):
        return not is_per_channel(module) or getattr(module, "axis", 1) % rank == axis
    spatial = keeps_channels(module) or type(module) in (*AVERAGES, *ADAPTIVE, *ZERO_PADDING, nn.Upsample)
    return spatial and axis == 1 and not getattr(module, "return_indices", False)


def _flattened(node: fx.Node, module: nn.Flatten, source: Channels) -> Channels | None:
    shape = shape_of(node.all_input_nodes[0])
    assert shape is not None
    if source.axis != 1 or module.start_dim != 1 or module.end_dim % len(shape) != len(shape) - 1:
        return None
    return Channels(1, source.sets.repeat_interleave(prod(shape[2:])))


def _kind(node: fx.Node) -> str:
    module = module_of(node)
    return type(module).__name__ if module is not None else getattr(node.target, "__name__", str(node.target))
