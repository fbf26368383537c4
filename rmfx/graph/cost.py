"""MACs and parameters of layers in a graph, from shapes where they are known.

MACs are multiply-accumulates of convolutions, transposed ones, too, and linear layers, per sample. Where sizes are
unknown they are counted per position of the region's fork, so that ratios still mean something.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import fx, nn

from rmfx.algebra.affine import Affine
from rmfx.graph.facts import module_of, shape_of
from rmfx.graph.linear import affine_of, map_of, mixes

_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
_TRANSPOSED_LAYERS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def positions_of(node: fx.Node, dims: int) -> int | None:
    """Output positions of a linear layer per sample, or ``None`` where its shape is unknown."""
    shape = shape_of(node)
    if shape is None:
        return None
    return prod(shape[2:]) if dims else prod(shape[1:-1])


def cost_of(nodes: Iterable[fx.Node], dims: int) -> tuple[float, int]:
    """(MACs, parameters) of layers in graph order; without shapes, the first inputs count as one position each."""
    macs, parameters = 0.0, 0
    density: dict[fx.Node, float] = {}
    for node in nodes:
        parameters += layer_parameters(node)
        density[node] = min((density.get(source, 1.0) for source in node.all_input_nodes), default=1.0)
        if not mixes(node):
            continue
        affine = affine_of(node, dims)
        for stride in affine.grid.stride:
            density[node] /= stride
        macs += affine.macs_per_position * (positions_of(node, dims) or density[node])
    return macs, parameters


def layer_parameters(node: fx.Node) -> int:
    """Parameters of the layer that ``node`` calls."""
    module = module_of(node)
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def affine_macs(affine: Affine, node: fx.Node) -> int | None:
    """MACs per sample of ``affine`` standing at ``node``; ``None`` where the shape is unknown."""
    positions = positions_of(node, affine.grid.dims)
    return None if positions is None else affine.macs_per_position * positions


def network_macs(gm: fx.GraphModule) -> int | None:
    """MACs per sample of all convolutions and linear layers, ``None`` where shapes are unknown.

    >>> from rmfx.prepare import prepare
    >>> net = torch.nn.Sequential(torch.nn.ConvTranspose2d(2, 4, 3, stride=2), torch.nn.Conv2d(4, 1, 1)).eval()
    >>> network_macs(prepare(net, torch.zeros(1, 2, 5, 5), {}).gm) == 25 * 2 * 4 * 9 + 121 * 4
    True
    """
    total = 0
    for node in gm.graph.nodes:
        if mixes(node):
            macs = affine_macs(map_of(node), node)
        elif (weight := _transposed(node)) is not None:
            source = shape_of(node.all_input_nodes[0])  # each position of what it reads meets the whole weight
            macs = None if source is None else prod(weight) * prod(source[2:])
        else:
            continue
        if macs is None:
            return None
        total += macs
    return total


def _transposed(node: fx.Node) -> torch.Size | None:
    """The shape of the weight of a transposed convolution; ``None`` for anything else."""
    module = module_of(node)
    if isinstance(module, _TRANSPOSED_LAYERS):
        return module.weight.shape
    if node.target not in _TRANSPOSED:
        return None
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    return shape_of(weight) if isinstance(weight, fx.Node) else None


def network_parameters(module: torch.nn.Module) -> int:
    """Number of parameters; a tensor that several modules share counts once."""
    return sum(p.numel() for p in module.parameters())
