"""Activations that are written out as a product, such as ``x * x.sigmoid()``, become the layer that they are."""

from __future__ import annotations

import math
import operator

import torch
from torch import fx, nn

from rmfx.algebra.exact import derive
from rmfx.front.install import Installer
from rmfx.front.kind_table import KindTable
from rmfx.modules import ChannelAffine, Elementwise


class Composites:
    """Spells the written-out activations of one graph.

    Args:
        gm: the graph module.
        installer: puts the new layers in place.
        kinds: what is known of each node.
    """

    def __init__(self, gm: fx.GraphModule, installer: Installer, kinds: KindTable) -> None:
        self.gm, self.installer, self.kinds = gm, installer, kinds

    def rewrite(self, node: fx.Node) -> bool:
        """Spell ``node``, a product of two tensors or a scaling, as an activation; returns whether it was one."""
        if node.op == "call_module":
            return self._scaled(node)
        if node.args[0] is node.args[1]:
            return self._squared(node)
        pairs = [(x, gate) for x, gate in (node.args, node.args[::-1]) if isinstance(x, fx.Node) and x is not gate]
        return any(isinstance(gate, fx.Node) and self._gated(node, x, gate) for x, gate in pairs)

    def _squared(self, node: fx.Node) -> bool:
        (x,) = node.all_input_nodes
        if self.kinds[x].floating:
            self.installer.layer(node, Elementwise("square"), x)
        return self.kinds[x].floating

    def _gated(self, node: fx.Node, x: fx.Node, gate: fx.Node) -> bool:
        kind, inside = self._call(gate)
        if inside is None or kind is None or not self.kinds[x].floating:
            return False
        if inside is x and type(kind) in _GATED:
            self.installer.layer(node, _GATED[type(kind)](), x)
            return True
        if type(kind) is nn.Tanh:
            soft, source = self._call(inside)
            # A softplus is x above its threshold; from 20 on the tanh of both is 1, to all digits of float64.
            mish = type(soft) is nn.Softplus and source is x and soft.beta == 1 and soft.threshold >= 20
            if mish:
                self.installer.layer(node, nn.Mish(), x)
            return mish
        slope = self._factor(inside, x) if type(kind) is nn.Sigmoid else None
        if slope:  # x * sigmoid(k x) = silu(k x) / k
            silu = self.installer.layer_before(node, nn.SiLU(), inside, "silu")
            self.kinds[silu] = self.kinds[inside]
            self.installer.layer(node, ChannelAffine(_reciprocal(self._module(inside))), silu)
            return True
        return False

    def _scaled(self, node: fx.Node) -> bool:
        """``relu6(x + 3) / 6`` is a hard sigmoid, ``x * relu6(x + 3) / 6`` a hard swish."""
        module, inside = self._call(node)
        if inside is None or not _is_scalar(module) or module.bias is not None or module.weight.is_meta:  # type: ignore[union-attr]
            return False
        if not math.isclose(_number(module.weight), 1 / 6, rel_tol=1e-6):  # type: ignore[union-attr, arg-type]
            return False
        if (source := self._raised(inside)) is not None:
            self.installer.layer(node, nn.Hardsigmoid(), source)
            return True
        if inside.op == "call_function" and inside.target is operator.mul:
            for x, gate in (inside.args, reversed(inside.args)):
                if isinstance(gate, fx.Node) and self._raised(gate) is x and isinstance(x, fx.Node):
                    self.installer.layer(node, nn.Hardswish(), x)
                    return True
        return False

    def _raised(self, node: fx.Node) -> fx.Node | None:
        """``x`` where ``node`` is ``relu6(x + 3)``."""
        clip, inside = self._call(node)
        if type(clip) is not nn.ReLU6 or inside is None:
            return None
        shift, source = self._call(inside)
        if not _is_scalar(shift) or shift.bias is None or shift.weight.is_meta:  # type: ignore[union-attr]
            return None
        return source if (_number(shift.weight), _number(shift.bias)) == (1, 3) else None  # type: ignore[union-attr, arg-type]

    def _factor(self, node: fx.Node, x: fx.Node) -> float | None:
        """``k`` where ``node`` is ``k * x``."""
        module, source = self._call(node)
        if source is not x or not _is_scalar(module) or module.bias is not None or module.weight.is_meta:  # type: ignore[union-attr]
            return None
        return _number(module.weight)  # type: ignore[union-attr, arg-type]

    def _module(self, node: fx.Node) -> nn.Module:
        return self.gm.get_submodule(str(node.target))

    def _call(self, node: fx.Node) -> tuple[nn.Module | None, fx.Node | None]:
        if node.op != "call_module" or len(node.all_input_nodes) != 1:
            return None, None
        return self._module(node), node.all_input_nodes[0]


_GATED: dict[type[nn.Module], type[nn.Module]] = {nn.Sigmoid: nn.SiLU, nn.Hardsigmoid: nn.Hardswish}


def _is_scalar(module: nn.Module | None) -> bool:
    return isinstance(module, ChannelAffine) and module.weight.dim() == 0


def _number(scalar: torch.Tensor) -> float:
    return float(scalar.detach())  # torch warns of numbers that have gradients


def _reciprocal(module: nn.Module) -> torch.Tensor:
    assert isinstance(module, ChannelAffine)
    return derive(module.weight.detach().reciprocal(), torch.reciprocal, module.weight)
