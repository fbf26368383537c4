"""Sums that stay are written the way they were: ``x - y`` was normalised to ``x + (-1) * y``."""

from __future__ import annotations

import operator

from torch import fx

from rmfx.graph.facts import is_sum, module_of
from rmfx.graph.tree import drop_unused
from rmfx.modules import ChannelAffine


def restore(gm: fx.GraphModule) -> None:
    """Turn ``add(x, ChannelAffine(-1)(y))`` back into ``x - y``, in place."""
    for node in list(gm.graph.nodes):
        if not is_sum(node) or len(node.all_input_nodes) != 2:
            continue
        first, second = node.args
        assert isinstance(second, fx.Node)
        scale = module_of(second)
        if not isinstance(scale, ChannelAffine) or len(second.users) > 1 or scale.weight.is_meta:
            continue
        if scale.weight.dim() or scale.bias is not None or float(scale.weight) != -1.0:
            continue
        node.target = operator.sub
        node.args = (first, second.all_input_nodes[0])
        gm.graph.erase_node(second)
    drop_unused(gm)
