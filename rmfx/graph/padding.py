"""Convolutions that pad the two sides of an axis differently: a layer of zeros in front, and a convolution behind it.

A layer of ``torch.nn`` pads both sides alike. One kernel that is large enough would do without the layer of zeros, but
takes more multiplications: 5 taps instead of 3 for a causal convolution, 16 instead of 9 for a strided one that pads
one side of an image.
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx, nn

from rmfx.algebra.affine import Affine, compose
from rmfx.algebra.grid import layer_grid
from rmfx.errors import InexactError
from rmfx.graph.editor import Editor
from rmfx.graph.facts import ZERO_PADDING, module_of
from rmfx.graph.linear import affine_of, dims_of, map_of, mixes

_PADS: tuple[type[nn.Module], ...] = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)


def split_padding(gm: fx.GraphModule) -> None:
    """Put zeros in front of each new convolution whose layer would need a larger kernel for its padding, in place.

    Args:
        gm: a graph whose new layers have an :class:`rmfx.algebra.affine.Affine` in ``node.meta["affine"]``.
    """
    editor = Editor(gm)
    wide = [node for node in gm.graph.nodes if _is_wide(node)]
    for node in wide:
        affine: Affine = node.meta["affine"]
        axes = affine.grid.axes
        shared = [max(0, min(axis.before, axis.after)) for axis in axes]
        sides = [(axis.before - both, axis.after - both) for axis, both in zip(axes, shared, strict=True)]
        zeros = _PADS[len(sides) - 1](tuple(side for pair in reversed(sides) for side in pair))
        rest = [replace(axis, before=both, after=both) for axis, both in zip(axes, shared, strict=True)]
        narrow = replace(affine, grid=replace(affine.grid, axes=tuple(rest)))
        pad = editor.fresh(node.meta.get("place", ""), "pad")
        padded = editor.layer(zeros, node.all_input_nodes[0], node, pad)
        new = editor.linear(narrow, padded, node, str(node.target))
        new.meta = {**new.meta, **node.meta, "affine": narrow}
        node.replace_all_uses_with(new)
        editor.erase([node])
    if wide:
        editor.finish()


def join_padding(gm: fx.GraphModule) -> bool:
    """The way back: each convolution that alone reads a layer of zeros pads by itself, in place, until it is split.

    Returns:
        Whether there was one.
    """
    editor, found = Editor(gm), False
    for node in list(gm.graph.nodes):
        zeros = node.all_input_nodes[0] if mixes(node) and len(node.all_input_nodes) == 1 else None
        if zeros is None or not isinstance(module_of(zeros), ZERO_PADDING) or len(zeros.users) > 1:
            continue
        dims = dims_of(node)
        try:
            own = map_of(node)
            padded = compose(own, affine_of(zeros, dims, own.in_channels)) if dims else None
        except InexactError:  # another mode
            continue
        if padded is not None:
            new = editor.linear(padded, zeros.all_input_nodes[0], node, str(node.target))
            editor.replace(node, new)
            editor.erase((node, zeros))
            found = True
    editor.finish()
    return found


def _is_wide(node: fx.Node) -> bool:
    affine = node.meta.get("affine")
    if not isinstance(affine, Affine) or affine.grid.mode != "zeros":
        return False
    return layer_grid(affine.grid)[0].taps > affine.grid.taps
