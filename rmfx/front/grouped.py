"""Sums over groups of channels, as split attention writes them, become sums of channel slices.

x.reshape(b, r, c, h, w).sum(1)                     =>  x[:, :c] + x[:, c:2c] + ...
(torch.stack(paths, 1) * gates).sum(1)              =>  with y = cat(paths, 1) * gates.flatten(1, 2): the same of y
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from rmfx.front.calls import argument
from rmfx.front.install import Installer
from rmfx.front.joined import within_operand
from rmfx.front.kind_table import KindTable
from rmfx.front.opnames import op_name
from rmfx.front.shuffles import group_count
from rmfx.modules import ChannelSlice

_MOST_GROUPS = 16


class Grouped:
    """Spells the sums over groups of one graph.

    Args:
        installer: puts the new layers in place.
        kinds: what is known of each node.
    """

    def __init__(self, installer: Installer, kinds: KindTable) -> None:
        self.installer, self.kinds = installer, kinds

    def rewrite(self, node: fx.Node) -> bool:
        """Spell ``node``, a sum over dimension 1, as a sum of slices; returns whether it was one over groups."""
        source = argument(node, 0, "input", None)
        axes = argument(node, 1, "dim", None)
        keeps = argument(node, 2, "keepdim", False) or "dtype" in node.kwargs
        if op_name(node) != "sum" or axes not in (1, (1,), [1]) or keeps or not isinstance(source, fx.Node):
            return False
        kind = self.kinds[source]
        groups, width = kind.sizes[1:3] if kind.rank and kind.rank > 3 else (None, None)
        if not groups or not width or not 2 <= groups <= _MOST_GROUPS or not self._can_merge(source, groups, width):
            return False
        terms = self._slices(node, self._merged(node, source), groups, width)
        total = terms[0]
        for term in terms[1:-1]:
            total = self._call(node, operator.add, total, term)
        node.op, node.target, node.args, node.kwargs = "call_function", operator.add, (total, terms[-1]), {}
        return True

    def _can_merge(self, node: fx.Node, groups: int, width: int) -> bool:
        """Whether one tensor with ``groups * width`` channels can hold what ``node`` does."""
        if self.kinds[node].sizes[1:3] != (groups, width):
            return False
        if self._is_product(node):
            real = [self._is_split(arg) or self._paths(arg) for arg in node.all_input_nodes]
            return any(real) and all(self._has_groups(arg, groups, width) for arg in node.all_input_nodes)
        return self._is_split(node) or bool(self._paths(node))

    def _has_groups(self, node: fx.Node, groups: int, width: int) -> bool:
        return self.kinds[node].sizes[1:3] == (groups, width)

    def _is_product(self, node: fx.Node) -> bool:
        ranks = {self.kinds[arg].rank for arg in node.all_input_nodes}
        return node.op == "call_function" and node.target is operator.mul and len(node.args) == 2 and len(ranks) == 1

    def _is_split(self, node: fx.Node) -> bool:
        source = node.args[0] if node.args else None
        if op_name(node) not in ("view", "reshape", "unflatten") or not isinstance(source, fx.Node):
            return False
        known = self.kinds[source]
        same_rank = known.rank is not None and known.rank + 1 == self.kinds[node].rank
        return same_rank and known.channels is not None and group_count(node, source, self.kinds) is not None

    def _paths(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that ``node`` stacks along dimension 1."""
        if op_name(node) != "stack" or argument(node, 1, "dim", 0) != 1:
            return []
        parts = argument(node, 0, "tensors", ())
        whole = isinstance(parts, tuple | list) and all(isinstance(part, fx.Node) for part in parts)
        return list(parts) if whole else []

    def _merged(self, before: fx.Node, node: fx.Node) -> fx.Node:
        """A node whose channels are those of all groups of ``node``."""
        if self._is_product(node):
            first, second = (self._merged(before, arg) for arg in node.args if isinstance(arg, fx.Node))
            return self._call(before, operator.mul, first, second)
        if self._is_split(node):
            return node.all_input_nodes[0]
        if paths := self._paths(node):
            return self._call(before, torch.cat, tuple(paths), 1)
        return self._known(self.installer.layer_before(before, nn.Flatten(1, 2), node, "flat"))

    def _slices(self, before: fx.Node, whole: fx.Node, groups: int, width: int) -> list[fx.Node]:
        return [self._slice(before, whole, index * width, width) for index in range(groups)]

    def _slice(self, before: fx.Node, whole: fx.Node, start: int, width: int) -> fx.Node:
        source, start = within_operand(whole, 1, start, width, self.kinds)
        if self.kinds[source].channels == width:
            return source
        return self._known(self.installer.layer_before(before, ChannelSlice(start, width), source, "part"))

    def _call(self, before: fx.Node, function: Callable[..., Any], *operands: Any) -> fx.Node:
        return self._known(self.installer.call_before(before, function, *operands))

    def _known(self, new: fx.Node) -> fx.Node:
        self.kinds.read(new)
        return new
