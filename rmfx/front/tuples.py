"""Hands the parts of a split out one by one, where code slices the tuple of them: ``x.chunk(4, 1)[::-1]``."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from rmfx.front.calls import SPLITS, argument, is_literal_slice, part_lengths
from rmfx.front.install import Installer
from rmfx.front.kind_table import KindTable
from rmfx.front.opnames import op_name


def hand_out(node: fx.Node, installer: Installer, kinds: KindTable) -> list[fx.Node]:
    """Let whoever reads ``node``, a slice of the tuple that a split gives, read the parts.

    Returns:
        The new nodes, each of which picks one part; none where ``node`` is something else.
    """
    split = node.args[0] if node.target is operator.getitem else None
    key = node.args[1] if isinstance(split, fx.Node) and op_name(split) in SPLITS else None
    if not isinstance(split, fx.Node) or not is_literal_slice(key):
        return []
    source = argument(split, 0, "input", argument(split, 0, "tensor", None))
    found = part_lengths(split, kinds[source]) if isinstance(source, fx.Node) else None
    if found is None:
        return []
    indices = range(len(found[1]))[key]
    parts = [installer.call_before(node, operator.getitem, split, index) for index in indices]
    _replace(node, tuple(parts))
    return parts


def _replace(node: fx.Node, parts: tuple[fx.Node, ...]) -> None:
    for user in list(node.users):
        key: Any = user.args[1] if user.target is operator.getitem and user.args[0] is node else None
        if is_literal_slice(key):
            _replace(user, parts[key])
        elif key is None:
            user.args = map_arg(user.args, lambda source: parts if source is node else source)
            user.kwargs = map_arg(user.kwargs, lambda source: parts if source is node else source)
        elif type(key) is int and -len(parts) <= key < len(parts):
            user.replace_all_uses_with(parts[key])
