"""Tensors of zeros that stand for the number: ``skip = torch.zeros_like(x)``, to which every block adds something.

zeros + y                           =>  y
torch.where(mask, y, zeros)         =>  torch.where(mask, y, 0.0)

Only where zeros and ``y`` are known to have one type of floats and one shape, and zeros cannot stretch the result at
other inputs: where a size is 1 they might, but for that of the batch.
"""

from __future__ import annotations

from torch import fx

from rmfx.front.opnames import op_name

_ADDS = frozenset({"add", "iadd"})
_ZEROS = frozenset({"zeros_like", "new_zeros", "zeros"})


def drop_zeros(gm: fx.GraphModule) -> None:
    """Let who reads ``zeros + y`` read ``y``, and choices have the number."""
    for node in list(gm.graph.nodes):
        name = op_name(node)
        if node.op not in ("call_function", "call_method") or node.kwargs:
            continue
        if name in _ADDS and len(node.args) == 2:
            _drop(node)
        elif name == "where" and node.op == "call_function" and len(node.args) == 3:
            condition, first, second = node.args
            node.args = (condition, _number(first, second, node), _number(second, first, node))


def _drop(node: fx.Node) -> None:
    for zeros, other in (node.args, reversed(node.args)):
        if isinstance(zeros, fx.Node) and isinstance(other, fx.Node) and _number(zeros, other, node) == 0.0:
            node.replace_all_uses_with(other)
            node.graph.erase_node(node)
            return


def _number(value: fx.node.Argument, other: fx.node.Argument, result: fx.Node) -> fx.node.Argument:
    """0.0, where ``value`` is nothing but zeros beside ``other``; else itself."""
    if not isinstance(value, fx.Node) or value.op == "call_module" or op_name(value) not in _ZEROS:
        return value
    return 0.0 if isinstance(other, fx.Node) and _alike(value, other, result) else value


def _alike(*nodes: fx.Node) -> bool:
    shape, dtype = (nodes[0].meta.get(fact) for fact in ("shape", "dtype"))
    if shape is None or dtype is None or not dtype.is_floating_point or 1 in shape[1:]:
        return False
    return all(node.meta.get("shape") == shape and node.meta.get("dtype") == dtype for node in nodes)
