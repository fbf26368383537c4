"""Takes permutations away that only bring channels last and back: what stands between acts on them where they are.

    permute(0, 2, 3, 1) -> Linear -> GELU -> Linear -> permute(0, 3, 1, 2)    =>    Conv2d 1x1 -> GELU -> Conv2d 1x1

Whatever the permutations are, if the second undoes the first. A layer norm between them stays, and they with it.
"""

from __future__ import annotations

from torch import fx, nn

from rmfx.algebra.pointwise import POINTWISE
from rmfx.front.builders import one_by_one
from rmfx.front.calls import permutation
from rmfx.front.kind_table import KindTable
from rmfx.front.shapes import infer_shape
from rmfx.modules import ChannelAffine, ChannelClamp, MaskedActivation


def undo_channels_last(gm: fx.GraphModule, kinds: KindTable) -> None:
    """Let layers between a permutation and its inverse read and give channels in dimension 1, in place.

    Args:
        gm: a graph in which each layer has one call site.
        kinds: what is known of its nodes.
    """
    for node in gm.graph.nodes:
        back = _order(node, kinds)
        if back is None:
            continue
        layers, first = _layers_above(gm, node.all_input_nodes[0])
        forth = _order(first, kinds)
        if forth is None or len(forth) != len(back) or any(forth[axis] != i for i, axis in enumerate(back)):
            continue
        by_channel = forth[-1] == 1 and 3 <= len(forth) <= 5
        if by_channel or all(_acts_on_elements(_module(gm, layer)) for layer in layers):
            _put_back(gm, node, layers, first.all_input_nodes[0], len(forth))


def _put_back(gm: fx.GraphModule, node: fx.Node, layers: list[fx.Node], source: fx.Node, rank: int) -> None:
    for layer in layers:
        place, _, name = str(layer.target).rpartition(".")
        setattr(gm.get_submodule(place), name, _on_channels(_module(gm, layer), rank))
        layer.args, layer.kwargs = (source,), {}
        infer_shape(gm, layer)
        source = layer
    node.replace_all_uses_with(source)


def _module(gm: fx.GraphModule, node: fx.Node) -> nn.Module:
    return gm.get_submodule(str(node.target))


def _layers_above(gm: fx.GraphModule, node: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """The layers, in order, that act along the last axis and that only ``node`` below them reads; what they read."""
    layers: list[fx.Node] = []
    while node.op == "call_module" and len(node.users) == 1 and _acts_on_last(_module(gm, node)):
        layers.insert(0, node)
        (node,) = node.all_input_nodes
    return layers, node


def _acts_on_elements(module: nn.Module) -> bool:
    if isinstance(module, ChannelAffine):
        return module.weight.dim() == 0
    if isinstance(module, nn.PReLU):
        return module.num_parameters == 1
    by_channel = (ChannelClamp, MaskedActivation)
    return type(module) in (nn.Dropout, nn.Identity, *POINTWISE) and not isinstance(module, by_channel)


def _acts_on_last(module: nn.Module) -> bool:
    by_features = isinstance(module, ChannelAffine) and module.axis == -1
    return type(module) is nn.Linear or by_features or _acts_on_elements(module)


def _on_channels(module: nn.Module, rank: int) -> nn.Module:
    """The layer that does along dimension 1 what ``module`` does along the last one."""
    if isinstance(module, ChannelAffine) and module.weight.dim():
        return ChannelAffine(module.weight, module.bias, 1).eval()
    if type(module) is not nn.Linear:
        return module
    return one_by_one(module.weight, module.bias, rank - 2).eval()


def _order(node: fx.Node, kinds: KindTable) -> tuple[int, ...] | None:
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    rank = None if source is None else kinds[source].rank
    return None if rank is None else permutation(node, rank)
