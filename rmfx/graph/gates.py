"""Products in a graph: which operand is the data, which the gate, and what the gate is computed from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rmfx.graph.facts import is_plain, is_product, module_of, shape_of

MOST_NODES = 60  # of the computation of one gate


@dataclass(frozen=True)
class GatePath:
    """``product = data * factor``, where ``factor`` is computed aside.

    Attributes:
        product, data, factor: the nodes.
        side: what computes the factor from ``reads``, in graph order; nothing else reads any of it.
        reads: the tensors that enter it.
    """

    product: fx.Node
    data: fx.Node
    factor: fx.Node
    side: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]


def read_gate(product: fx.Node) -> GatePath | str:
    """The gate of a product of two tensors, or why it has none."""
    if not is_product(product) or len(product.all_input_nodes) != 2:
        return "the product is not one of two different tensors"
    data, factor = _operands(product)
    side = _side(factor, product)
    reads: dict[fx.Node, None] = {}
    for node in side:
        for source in node.all_input_nodes:
            if source not in side and source.op != "get_attr" and not is_plain(source):
                reads[source] = None
    if factor not in side:
        reads = {factor: None}
    return GatePath(product, data, factor, tuple(sorted(side)), tuple(sorted(reads)))


def _operands(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """(data, factor): the factor broadcasts, is computed from the data, by more than layers, or by fewer of them."""
    first, second = product.all_input_nodes
    shapes = [shape_of(node) for node in (product, first, second)]
    if shapes[1] is not None and shapes[2] is not None and shapes[1] != shapes[2]:
        return (first, second) if shapes[1] == shapes[0] else (second, first)
    sides = [_side(node, product) for node in (first, second)]
    if any(first in node.all_input_nodes for node in sides[1]) or not sides[0]:
        return first, second
    if any(second in node.all_input_nodes for node in sides[0]) or not sides[1]:
        return second, first
    opaque = [any(module_of(node) is None for node in side) for side in sides]
    if opaque[0] != opaque[1]:
        return (first, second) if opaque[1] else (second, first)
    return (first, second) if len(sides[1]) <= len(sides[0]) else (second, first)


def _side(factor: fx.Node, product: fx.Node) -> dict[fx.Node, None]:
    """The nodes that only this product needs, up to the tensors that others read too; readers before what they read."""
    side: dict[fx.Node, None] = {}
    todo = {factor}
    while todo and len(side) < MOST_NODES:
        node = max(todo)
        todo.remove(node)
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        readers = {user for user in node.users if not is_plain(user)}
        if not readers <= ({product} if node is factor else set(side)):
            continue
        side[node] = None
        todo |= set(node.all_input_nodes)
    return side
