"""Sums that begin with zeros: ``skip = torch.zeros_like(x)``, to which every block adds something."""

from __future__ import annotations

from torch import fx

from rmfx.front.opnames import op_name

_ADDS = frozenset({"add", "iadd"})
_ZEROS = frozenset({"zeros_like", "new_zeros", "zeros"})


def drop_zeros(gm: fx.GraphModule) -> None:
    """Let who reads ``zeros + y`` read ``y``, where both are known to have one type and one shape.

    A size of 1 in front of which zeros may stretch the result at other inputs does not count as known, but that of the
    batch.
    """
    for node in list(gm.graph.nodes):
        if op_name(node) in _ADDS and len(node.args) == 2 and not node.kwargs:
            for zeros, other in (node.args, reversed(node.args)):
                if _are_zeros(zeros) and isinstance(other, fx.Node) and _alike(zeros, other, node):
                    node.replace_all_uses_with(other)
                    gm.graph.erase_node(node)
                    break


def _are_zeros(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op != "call_module" and op_name(value) in _ZEROS


def _alike(*nodes: fx.Node) -> bool:
    known = {(node.meta.get("shape"), node.meta.get("dtype")) for node in nodes}
    (shape, dtype), *others = known
    return not others and shape is not None and dtype is not None and 1 not in shape[1:]
