"""Recognises a batch norm of features, which is written as a batch norm of all positions put after one another."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from rmfx.front.calls import sizes_of_call
from rmfx.front.install import Installer, clone_sharing
from rmfx.front.kind_table import KindTable
from rmfx.front.opnames import op_name
from rmfx.modules import FeatureNorm


def spell_feature_norm(node: fx.Node, installer: Installer, kinds: KindTable) -> bool:
    """Make ``norm(x.flatten(0, 1)).reshape_as(x)`` of LeViT a :class:`rmfx.modules.FeatureNorm`.

    Returns:
        Whether ``node``, the reshape back, was changed.
    """
    if op_name(node) not in ("reshape_as", "view_as", "reshape", "view") or not isinstance(node.args[0], fx.Node):
        return False
    norm, flat = _layer(node.args[0], nn.BatchNorm1d)
    flatten, x = (None, None) if flat is None else _layer(flat, nn.Flatten)
    rank = 0 if x is None else kinds[x].rank or 0
    if flatten is None or x is None or rank < 3 or norm.running_mean is None or norm.running_var is None:
        return False
    together = (flatten.start_dim % rank, flatten.end_dim % rank) == (0, rank - 2)
    if not together or not _back(node, x):
        return False
    own = clone_sharing(norm)
    assert isinstance(own, nn.BatchNorm1d)
    installer.layer(node, FeatureNorm(own), x)
    return True


def _layer(node: fx.Node, cls: type[nn.Module]) -> tuple[Any, fx.Node | None]:
    if node.op != "call_module" or len(node.all_input_nodes) != 1:
        return None, None
    module = node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]
    return (module, node.all_input_nodes[0]) if type(module) is cls else (None, None)


def _back(node: fx.Node, x: fx.Node) -> bool:
    """Whether ``node`` gives what it reads the shape of ``x``."""
    if op_name(node) in ("reshape_as", "view_as"):
        return node.args[1:] == (x,)
    sizes = sizes_of_call(node)
    read = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], fx.Node) else None
    return read is not None and read.args in ((x, "shape"), (x,)) and (read.target is getattr or read.target == "size")
