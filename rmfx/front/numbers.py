"""Replaces reads of sizes that the network fixes, such as ``x.shape[1]`` behind a convolution, by their numbers."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.node import map_arg

from rmfx.front.kind_table import KindTable


def write_numbers(gm: fx.GraphModule) -> bool:
    """Write every number that does not depend on the input out, in place; returns whether there was any."""
    table = KindTable(gm)
    found = False
    for node in gm.graph.nodes:
        found |= write_number(node, table)
    return found


def write_number(node: fx.Node, table: KindTable) -> bool:
    """Let the readers of ``node`` have its value, where it is a number whatever the input; returns whether it is."""
    kind = table.read(node)
    if kind.tensor or not _is_number(kind.value) or not node.users:
        return False
    for user in list(node.users):
        user.args = map_arg(user.args, lambda source: kind.value if source is node else source)
        user.kwargs = map_arg(user.kwargs, lambda source: kind.value if source is node else source)
    return True


def _is_number(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(_is_number(item) for item in value)
    return isinstance(value, bool | int | float)
