"""Takes sets of channels out of a network: every layer becomes narrower, the graph stays.

Of a layer ``y = W x + b`` that reads dropped channels ``c`` with constants ``v_c`` (:mod:`rmfx.pruning.constants`),

    y = sum_kept W_c x_c + (sum_dropped W_c v_c + b),

which is a new bias. Where zeros are padded a bias would be too much at the border. There one dropped channel ``d``
stays, as the constant ``v_d`` it emits, and all constants are read from it: ``W_d' = sum_c W_c v_c / v_d``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.affine import Affine
from rmfx.algebra.bounds import padding_taps
from rmfx.algebra.rows import columns_read
from rmfx.algebra.select import select_groups, select_inputs, select_outputs, without_weights
from rmfx.graph.editor import Editor
from rmfx.graph.facts import module_of, shape_of
from rmfx.graph.linear import map_of, mixes
from rmfx.layout.narrowing import narrowed
from rmfx.modules import ChannelPad, ChannelSlice
from rmfx.pruning.constants import constants_of, heard, scales_of
from rmfx.pruning.coupling import Channels, Coupling, is_group_wise


@dataclass(frozen=True, eq=False)
class Removal:
    """What is to be taken out, and what becomes of the constants.

    Attributes:
        gone: the sets that go, bool ``[count]``.
        homes: the sets that stay, as constants.
        silenced: those of them whose weights must be set to 0 for that.
        constants: for each layer that reads a set of either kind, the constants that count, float64 ``[in]``.
        lost: how many constants have no place to go to; leaving them out changes the function.
    """

    gone: Tensor
    homes: Tensor
    silenced: Tensor
    constants: Mapping[fx.Node, Tensor]
    lost: int

    def on(self, gm: fx.GraphModule) -> Removal:
        """The same, for another graph of the same network."""
        nodes = {node.name: node for node in gm.graph.nodes}
        return replace(self, constants={nodes[node.name]: value for node, value in self.constants.items()})


def settle(gm: fx.GraphModule, coupling: Coupling, dropped: Tensor, *, keep_constants: bool = True) -> Removal:
    """Decide which of the dropped sets stay as constants, for all layers that need one.

    Args:
        gm: in normal form.
        coupling: of it.
        dropped: which sets are to go, bool ``[count]``.
        keep_constants: or else they are all left out.
    """
    readers = [node for node in gm.graph.nodes if mixes(node) and not is_group_wise(node)]
    read = {node: found for node in readers if (found := coupling.channels.get(node.all_input_nodes[0])) is not None}
    read = {node: found for node, found in read.items() if bool(dropped[found.sets].any())}
    if not keep_constants:
        zeros = {node: torch.zeros(len(found.sets), dtype=torch.float64) for node, found in read.items()}
        none = torch.zeros_like(dropped)
        return Removal(dropped, none, none, zeros, 0)
    values, steady = _values(gm, coupling, dropped, read)
    homes = torch.zeros_like(dropped)
    lost = 0
    for node, found in read.items():
        affine, value = map_of(node), values[node]
        every = torch.ones(affine.out_channels, dtype=torch.bool)
        matters = dropped[found.sets] & (value != 0) & columns_read(affine, every)
        lost += int((matters & value.isnan()).sum())
        value = values[node] = torch.where(matters & ~value.isnan(), value, 0.0)
        if bool(value.any()) and bool(padding_taps(affine.grid).any()):
            _find_homes(affine, found, value, homes)
    return Removal(dropped & ~homes, homes, homes & ~steady, values, lost)


def _values(
    gm: fx.GraphModule, coupling: Coupling, dropped: Tensor, read: Mapping[fx.Node, Channels]
) -> tuple[dict[fx.Node, Tensor], Tensor]:
    """What every reader finds in dropped channels, and which sets say nothing as they are, wherever they are read."""
    steady = dropped.clone()
    as_they_are: dict[fx.Node, Tensor] = {}
    for node, found in read.items():
        speaking, as_they_are[node] = heard(node.all_input_nodes[0], found)
        steady[found.sets[speaking]] = False
    left = constants_of(gm, coupling, dropped & ~steady)
    return {
        node: torch.where(steady[found.sets], as_they_are[node], left[node.all_input_nodes[0]])
        for node, found in read.items()
    }, steady


def _find_homes(affine: Affine, found: Channels, value: Tensor, homes: Tensor) -> None:
    """Let more sets stay, in ``homes``, until every group with a constant has one that is not 0.

    Groups are tied (:mod:`rmfx.pruning.coupling`): a set has its channel in each of them, though perhaps one that is 0.
    """
    blocks = value.reshape(affine.groups, -1) != 0
    sets = found.sets.reshape(affine.groups, -1)
    while bool((missing := blocks.any(1) & ~(blocks & homes[sets]).any(1)).any()):
        best = int(blocks[missing].sum(0).argmax())
        homes[sets[0, best]] = True


def remove(gm: fx.GraphModule, coupling: Coupling, removal: Removal) -> None:
    """Make every layer of ``gm`` narrower, in place; their weights are computed on emission."""
    editor = Editor(gm)
    touched = removal.gone | removal.silenced
    known = [(node, [coupling.channels.get(x) for x in (node, *node.all_input_nodes)]) for node in gm.graph.nodes]
    for node, (channels, *sources) in known:
        near = [found for found in (channels, *sources) if found is not None]
        if not any(bool(touched[found.sets].any()) for found in near):
            continue
        new = _rewritten(node, channels, sources, removal, editor)
        shape = shape_of(node)
        if channels is not None and shape is not None:
            sizes = [*shape]
            sizes[channels.axis] = int((~removal.gone[channels.sets]).sum())
            new.meta["shape"] = torch.Size(sizes)
    editor.finish()


def _rewritten(
    node: fx.Node, channels: Channels | None, sources: list[Channels | None], removal: Removal, editor: Editor
) -> fx.Node:
    """The node with fewer channels in its place."""
    layer = _narrow(node, channels, sources, removal)
    if layer is None:
        return node
    source, name = node.all_input_nodes[0], str(node.target)
    if isinstance(layer, Affine):
        new = editor.linear(layer, source, node, name)
    else:
        new = editor.layer(layer, source, node, name)
    editor.replace(node, new)
    editor.erase([node])
    return new


def _narrow(
    node: fx.Node, channels: Channels | None, sources: list[Channels | None], removal: Removal
) -> Affine | nn.Module | None:
    """The layer of ``node`` on the channels that stay; ``None`` where it fits any number of them."""
    module = module_of(node)
    if module is None or channels is None:
        return None
    stays = ~removal.gone[channels.sets]
    if mixes(node):
        return _narrow_map(node, sources[0], channels, removal)
    if isinstance(module, ChannelSlice) and sources[0] is not None and len(sources[0].sets) != len(stays):
        start = int((~removal.gone[sources[0].sets[: module.start]]).sum())
        return ChannelSlice(start, int(stays.sum()), module.axis)
    if isinstance(module, ChannelPad) and sources[0] is not None and len(sources[0].sets) != len(stays):
        before, after = (int(end.sum()) for end in (stays[: module.before], stays[len(stays) - module.after :]))
        return ChannelPad(before, after, module.axis)
    silenced = removal.silenced[channels.sets][stays]
    new = narrowed(module, stays.nonzero().flatten())
    if bool(silenced.any()) and (layer := scales_of(new)) is not None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        with torch.no_grad():
            weight[silenced.to(weight.device)] = 0.0  # a copy
    return new if new.state_dict() else None


def _narrow_map(node: fx.Node, source: Channels | None, channels: Channels, removal: Removal) -> Affine:
    affine, silenced = map_of(node), removal.silenced[channels.sets]
    if bool(silenced.any()):
        affine = without_weights(affine, silenced)  # first: what its inputs emit does not reach a silenced channel
    if is_group_wise(node) and source is not None:  # of unknown inputs, all stay
        return select_groups(affine, (~removal.gone[source.sets]).nonzero().flatten())
    if source is not None and node in removal.constants:
        kept = (~removal.gone[source.sets]).nonzero().flatten()
        affine = select_inputs(affine, kept, removal.constants[node])
    return select_outputs(affine, (~removal.gone[channels.sets]).nonzero().flatten())
