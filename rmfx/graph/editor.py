"""The only code that mutates a graph and its module tree while passes run.

New linear layers are made on the meta device, and the :class:`rmfx.algebra.affine.Affine` that will give their weights
waits in ``node.meta["affine"]`` until :mod:`rmfx.graph.emit` computes it. So a pass costs no arithmetic and no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx, nn

from rmfx.algebra.affine import Affine, dense
from rmfx.algebra.grid import layer_grid
from rmfx.graph.facts import dtype_of, module_range, range_of, shape_of
from rmfx.graph.stages import STAGES
from rmfx.graph.tree import drop_unused

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Editor:
    """Inserts layers, moves readers, erases nodes; keeps names, places and facts in order.

    Args:
        gm: the graph module to edit, in normal form.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self._taken = {str(node.target) for node in gm.graph.nodes if node.op in ("call_module", "get_attr")}

    def linear(self, affine: Affine, source: fx.Node, before: fx.Node, name: str) -> fx.Node:
        """Insert the layer of ``affine`` reading ``source``; its weights are computed on emission."""
        affine = affine if affine.grid.dims else dense(affine)  # nn.Linear has no groups
        node = self.layer(meta_layer(affine), source, before, name)
        node.meta["affine"] = affine
        shape, grid = shape_of(source), affine.grid
        if shape is not None and grid.dims:
            node.meta["shape"] = torch.Size([shape[0], affine.out_channels, *grid.out_size(shape[2:])])
        elif shape is not None:
            node.meta["shape"] = torch.Size([*shape[:-1], affine.out_channels])
        return node

    def layer(self, module: nn.Module, source: fx.Node, before: fx.Node, name: str) -> fx.Node:
        """Insert ``module`` under the qualified ``name`` reading ``source``; replaces what had that name."""
        self.gm.add_submodule(name, module.eval())
        self._taken.add(name)
        with self.gm.graph.inserting_before(before):
            node = self.gm.graph.call_module(name, (source,))
        node.meta["made"] = True
        node.meta["place"] = name.rpartition(".")[0]
        node.meta["range"] = module_range(module, range_of(source))
        if (dtype := dtype_of(source)) is not None:
            node.meta["dtype"] = dtype  # layers keep it
        if (shape := shape_of(source)) is not None:
            node.meta["shape"] = module(torch.empty(shape, device="meta")).shape if type(module) in STAGES else shape
        return node

    def fresh(self, place: str, word: str) -> str:
        """A qualified name inside ``place`` that no node uses yet."""
        base = f"{place}.{word}" if place else word
        name, count = base, 0
        while name in self._taken or _resolves(self.gm, name):
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every reader of ``old`` read ``new``, which computes the same value."""
        for key in ("origin", "place", "shape", "dtype", "range", "rank"):
            if key in old.meta:
                new.meta[key] = old.meta[key]
        old.replace_all_uses_with(new)

    def erase(self, nodes: Iterable[fx.Node]) -> None:
        """Erase ``nodes`` that nothing reads any more; pass readers before what they read."""
        for node in nodes:
            self.gm.graph.erase_node(node)

    def finish(self) -> None:
        """Bring code and module tree in line with the graph; called once per pass."""
        drop_unused(self.gm)
        self.gm.graph.lint()
        self.gm.recompile()


def meta_layer(affine: Affine) -> nn.Module:
    """The ``torch.nn`` layer of ``affine``, with weights on the meta device."""
    grid, _ = layer_grid(affine.grid)
    if not grid.dims:
        return nn.Linear(affine.in_channels, affine.out_channels, affine.has_bias, device="meta")
    conv: Callable[..., nn.Module] = _CONVS[grid.dims - 1]
    return conv(
        affine.in_channels,
        affine.out_channels,
        grid.kernel,
        grid.stride,
        tuple(axis.before for axis in grid.axes) if grid.symmetric else "same",
        grid.dilation,
        affine.groups,
        affine.has_bias,
        grid.mode,
        device="meta",
    )


def _resolves(gm: fx.GraphModule, name: str) -> bool:
    owner: object = gm
    for part in name.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True
