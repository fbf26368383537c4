"""One sweep over a graph that spells every operation, knowing of each what is known of the values before it."""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch import Tensor, fx

from rmfx.front.arithmetic import Arithmetic
from rmfx.front.channels import Channels, drop_expansion
from rmfx.front.choices import spell_choice
from rmfx.front.composites import Composites
from rmfx.front.crops import spell_crop
from rmfx.front.einsum import spell_einsum
from rmfx.front.features import spell_feature_norm
from rmfx.front.grouped import Grouped
from rmfx.front.install import Installer
from rmfx.front.kind_table import KindTable, parameter_dtype
from rmfx.front.masked import spell_masked
from rmfx.front.numbers import write_number
from rmfx.front.shuffles import spell_shuffle
from rmfx.front.spelling import spell
from rmfx.front.tuples import hand_out

_PAIRS = (operator.add, operator.mul)


class Sweep:
    """Visits the nodes of one graph in order.

    Args:
        gm: the graph module to change.
        installer: puts the new layers in place.
        constant: the tensor that a ``get_attr`` node reads, ``None`` for other nodes.
    """

    def __init__(self, gm: fx.GraphModule, installer: Installer, constant: Callable[[fx.Node], Tensor | None]) -> None:
        self.installer, self.constant = installer, constant
        self.kinds = KindTable(gm)
        self.channels = Channels(installer, self.kinds)
        self.arithmetic = Arithmetic(installer, self.kinds, constant, parameter_dtype(gm))
        self.grouped = Grouped(installer, self.kinds)
        self.composites = Composites(gm, installer, self.kinds)

    def visit(self, node: fx.Node) -> None:
        """Spell ``node`` in normal form."""
        write_number(node, self.kinds)  # reads the kind of the node first
        if not node.users or node.op in ("placeholder", "get_attr", "output"):
            return
        for part in hand_out(node, self.installer, self.kinds):
            self.visit(part)
        moved = self.channels.rewrite(node) or spell_shuffle(node, self.installer, self.kinds)
        moved = moved or spell_crop(node, self.installer, self.kinds)
        moved = moved or spell_feature_norm(node, self.installer, self.kinds)
        moved = moved or spell_einsum(node, self.installer, self.kinds, self.constant)
        moved = moved or spell_masked(node, self.installer, self.kinds, self.constant)
        moved = moved or spell_choice(node, self.installer, self.kinds)
        if not (moved or self.grouped.rewrite(node)):
            self._layer(node)
            self.arithmetic.rewrite(node)
            self.kinds.read(node)
            if node.op == "call_function" and node.target in _PAIRS and self.kinds[node].tensor:
                drop_expansion(node, self.kinds)
            if node.op == "call_module" or (node.target is operator.mul and self.kinds[node].tensor):
                self.composites.rewrite(node)
        self.kinds.read(node)

    def _layer(self, node: fx.Node) -> None:
        spelled = spell(node, self.kinds.__getitem__, self.constant)
        if spelled is not None:
            self.installer.layer(node, spelled.layer, spelled.source)
