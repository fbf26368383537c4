"""MACs and parameters of layers in a graph, from shapes where they are known.

MACs are multiply-accumulates of convolutions and linear layers, per sample. Where sizes are unknown they are
counted per position of the region's fork, so that ratios still mean something.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import fx

from rmfx.algebra.affine import Affine
from rmfx.graph.facts import module_of, shape_of
from rmfx.graph.linear import affine_of, dims_of, mixes


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
    """MACs per sample of all convolutions and linear layers, ``None`` where shapes are unknown."""
    total = 0
    for node in gm.graph.nodes:
        if not mixes(node):
            continue
        dims = dims_of(node)
        assert dims is not None
        macs = affine_macs(affine_of(node, dims), node)
        if macs is None:
            return None
        total += macs
    return total


def network_parameters(module: torch.nn.Module) -> int:
    """Number of parameters; a tensor that several modules share counts once."""
    return sum(p.numel() for p in module.parameters())
