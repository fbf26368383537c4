"""Gates over a stack: what they read is picked out of it, what they give is spread over it.

A gate multiplies some channels of the stack and must leave the others as they are: their factor is exactly 1. What is
added from outside to some channels is exactly 0 for the others.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.affine import Affine, Weights, rounded
from rmfx.algebra.grid import Grid
from rmfx.graph.facts import dtype_of, module_of, shape_of
from rmfx.graph.gates import GatePath
from rmfx.layout.problem import NewGate

if TYPE_CHECKING:
    from rmfx.graph.editor import Editor

# Pools that act alike on every channel: what a gate reads is picked behind them, where it is small. A mean may be
# taken before any linear map, a maximum only before one that does not add channels up.
_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_POOLS_OF_MAXIMA = (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)

# Arguments at which these activations are exactly 1, in every float type: a gate can be spread before them.
_ONES: dict[type[nn.Module], float] = {nn.Sigmoid: 40.0, nn.Hardsigmoid: 6.0}


def argument_of_one(activation: nn.Module | None) -> float | None:
    """Where ``activation`` gives exactly 1, or ``None`` where no such argument is known.

    >>> float(nn.Sigmoid()(torch.tensor(argument_of_one(nn.Sigmoid()), dtype=torch.float64)))
    1.0
    """
    return _ONES.get(type(activation)) if activation is not None else None


def spread_factor(active: Sequence[int], channels: int, dims: int, carried: float, inverted: bool = False) -> Affine:
    """The 1x1 map from a gate's ``channels`` to the stack: channel ``active[i]``, or ``carried`` where that is -1.

    Args:
        inverted: of the active channels ``1 - x``.

    >>> spread_factor([1, 0, -1], 2, 2, 1.0).weights()[1]
    tensor([0., 0., 1.], dtype=torch.float64)
    """
    picked = torch.tensor(active)

    def compute() -> Weights:
        bias = torch.where(picked < 0, carried, float(inverted)).double()
        weight = _one_hot(picked, channels) * (-1.0 if inverted else 1.0)
        return weight.reshape(len(active), channels, *[1] * dims), bias

    return Affine(channels, len(active), 1, Grid.sampling([1] * dims), True, rounded(compute))


def _one_hot(picked: Tensor, channels: int) -> Tensor:
    weight = torch.zeros(len(picked), channels, dtype=torch.float64)
    rows = (picked >= 0).nonzero().flatten()
    weight[rows, picked[rows]] = 1.0
    return weight


def emit_gate(path: GatePath, new: NewGate, stack: fx.Node, before: fx.Node, dims: int, editor: Editor) -> fx.Node:
    """Put the gate's computation behind ``stack``, reading and multiplying it; returns the product (or the sum).

    Args:
        dims: spatial dimensions of the layers around.
    """
    for node in path.side:
        before.prepend(node)  # it stays what it is, but reads the stack now
    for read, affine, picks in zip(path.reads, new.reads, new.picks, strict=True):
        early = (*_POOLS, *(_POOLS_OF_MAXIMA if picks else ())) if dims else ()  # features are no positions
        _redirect(path, read, affine, stack, early, editor)
    factor = _spread(path, new, stack, dims, before, editor)
    operation: Any = path.node.target if path.mask is None else operator.mul  # what is masked is finite
    with editor.gm.graph.inserting_before(before):
        product = editor.gm.graph.call_function(operation, (stack, factor))
    product.meta |= {"made": True, "place": path.node.meta.get("place", "")}
    product.meta |= {key: stack.meta[key] for key in ("shape", "dtype") if key in stack.meta}
    return product


def _redirect(
    path: GatePath,
    read: fx.Node,
    affine: Affine,
    stack: fx.Node,
    early: tuple[type[nn.Module], ...],
    editor: Editor,
) -> None:
    """Let the side path read its tensor out of the stack; the pools ``early`` go before the picking."""
    readers = [node for node in path.side if read in node.all_input_nodes]
    place = path.node.meta.get("place", "")
    for node in readers:
        if isinstance(module_of(node), early):
            node.replace_input_with(read, stack)
            shape, wide = shape_of(node), shape_of(stack)
            later = list(node.users)
            picked = editor.linear(affine, node, node.next, editor.fresh(place, "pick"))
            if shape is not None and wide is not None:
                picked.meta["shape"] = shape
                node.meta["shape"] = torch.Size([shape[0], wide[1], *shape[2:]])
            for user in later:
                user.replace_input_with(node, picked)
        else:
            picked = editor.linear(affine, stack, node, editor.fresh(place, "pick"))
            node.replace_input_with(read, picked)


def _spread(path: GatePath, new: NewGate, stack: fx.Node, dims: int, before: fx.Node, editor: Editor) -> fx.Node:
    """The factor over all channels of the stack: spread before the last activation where that can give exactly 1."""
    (factor,) = (node for node in path.node.all_input_nodes if node is not path.data)  # picked, where it is a pool
    place = path.node.meta.get("place", "")
    activation = module_of(factor)
    carried = argument_of_one(activation) if path.neutral == 1.0 else None
    if path.factor in path.reads:
        factor = editor.linear(new.reads[0], stack, before, editor.fresh(place, "pick"))
    if (dtype := dtype_of(path.factor)) is not None and not dtype.is_floating_point:  # a mask
        with editor.gm.graph.inserting_before(before):
            mask = factor
            factor = editor.gm.graph.call_method("type_as", (mask, stack))
        factor.meta.update(place=place, shape=shape_of(mask), dtype=dtype_of(stack))
    if factor is not path.factor or carried is None or len(factor.users) != 1:
        spread = spread_factor(new.active, new.channels, dims, path.neutral, path.mask == "true")
        return editor.linear(spread, factor, before, editor.fresh(place, "spread"))
    (source,) = factor.all_input_nodes
    wide = editor.linear(
        spread_factor(new.active, new.channels, dims, carried), source, factor, editor.fresh(place, "spread")
    )
    factor.replace_input_with(source, wide)
    if (shape := shape_of(factor)) is not None:
        wide_shape = [shape[0], len(new.active), *shape[2:]] if dims else [*shape[:-1], len(new.active)]
        factor.meta["shape"] = torch.Size(wide_shape)
    return factor
