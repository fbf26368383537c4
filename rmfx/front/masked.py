"""Recognises an activation of some channels only, that is written as a choice between its result and its input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from rmfx.algebra.pointwise import is_per_channel, is_pointwise
from rmfx.front.install import Installer
from rmfx.front.kind_table import KindTable
from rmfx.modules import MaskedActivation


def spell_masked(
    node: fx.Node, installer: Installer, kinds: KindTable, constant: Callable[[fx.Node], Tensor | None]
) -> bool:
    """Make ``torch.where(mask, phi(x), x)``, with a fixed mask of the channels, a masked activation.

    Returns:
        Whether ``node``, the choice, was changed.
    """
    if node.target is not torch.where or node.kwargs or len(node.args) != 3:
        return False
    choice, acted, source = node.args
    if not (isinstance(choice, fx.Node) and isinstance(acted, fx.Node) and isinstance(source, fx.Node)):
        return False
    if acted.op != "call_module" or acted.all_input_nodes != [source] or len(acted.users) != 1:
        return False
    activation, mask = installer.gm.get_submodule(str(acted.target)), constant(choice)
    rank, channels = kinds[source].rank, kinds[source].channels
    if not is_pointwise(activation) or is_per_channel(activation) or mask is None or rank is None or channels is None:
        return False
    if mask.dtype != torch.bool or [1] * (rank - mask.dim()) + list(mask.shape) != [1, channels, *[1] * (rank - 2)]:
        return False
    installer.layer(node, MaskedActivation(activation, mask.detach().flatten()), source)
    return True
