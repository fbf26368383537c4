"""Leaky ReLUs that are written out as a choice between ``x`` and a multiple of it become the layer that they are.

where(x > 0, x, k * x)            =>  LeakyReLU(k)
maximum(x, k * x), 0 <= k <= 1    =>  LeakyReLU(k)
x.masked_fill(x < 0, 0)           =>  ReLU
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from rmfx.front.calls import choice
from rmfx.front.install import Installer
from rmfx.front.kind_table import KindTable
from rmfx.front.opnames import op_name
from rmfx.modules import ChannelAffine

_ABOVE, _BELOW = ("gt", "ge"), ("lt", "le")


def spell_choice(node: fx.Node, installer: Installer, kinds: KindTable) -> bool:
    """Make ``node`` a leaky ReLU; returns whether it was one."""
    found = _read(node, installer)
    if found is None or not kinds[found[0]].floating:
        return False
    x, slope = found
    installer.layer(node, nn.LeakyReLU(slope) if slope else nn.ReLU(), x)
    return True


def _read(node: fx.Node, installer: Installer) -> tuple[fx.Node, float] | None:
    """``x`` and the slope below zero."""
    if (chosen := choice(node)) is not None:
        return _chosen(*chosen, installer)
    if op_name(node) in ("maximum", "max") and len(node.args) == 2 and not node.kwargs:
        pairs = [(x, _slope(other, x, installer)) for x, other in (node.args, node.args[::-1])]
        return next(((x, k) for x, k in pairs if isinstance(x, fx.Node) and k is not None and 0 < k <= 1), None)
    return None


def _chosen(condition: Any, first: Any, second: Any, installer: Installer) -> tuple[fx.Node, float] | None:
    """What is chosen where ``condition`` compares the ``x`` among both with zero: ``x`` above, a multiple below."""
    if not isinstance(condition, fx.Node) or len(condition.args) != 2 or condition.kwargs or condition.args[1] != 0:
        return None
    x, name = condition.args[0], op_name(condition)
    if not isinstance(x, fx.Node) or name not in (*_ABOVE, *_BELOW):
        return None
    above, below = (first, second) if name in _ABOVE else (second, first)
    slope = _slope(below, x, installer)
    return (x, slope) if above is x and slope is not None else None


def _slope(value: Any, x: Any, installer: Installer) -> float | None:
    """``k`` where ``value`` is ``k * x``, or 0."""
    if not isinstance(value, fx.Node):
        return 0.0 if type(value) in (int, float) and value == 0 else None
    module = installer.gm.get_submodule(str(value.target)) if value.op == "call_module" else None
    if not isinstance(module, ChannelAffine) or value.all_input_nodes != [x]:
        return None
    weight = module.weight
    known = weight.dim() == 0 and module.bias is None and not weight.is_meta
    return float(weight) if known and not isinstance(weight, nn.Parameter) else None  # what trains goes on training
