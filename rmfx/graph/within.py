"""What depends on a fork: everything else that a branch reads comes from outside (a mask, a condition, a constant)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from rmfx.graph.facts import is_plain


def forks(join: fx.Node, most: int) -> list[frozenset[fx.Node]]:
    """For each of the latest tensors that all operands of ``join`` depend on: it, and what ``join`` needs of it.

    None of these tensors depends on another. There are several where both branches read a condition, too.

    Args:
        most: nodes to look at.
    """
    operands = set(join.all_input_nodes)
    if operands != _tensors(operands):
        return []
    marks = {operand: {operand} for operand in operands}  # which operands each node is needed for
    todo, needed, common = set(operands), list[fx.Node](), list[fx.Node]()
    while todo and len(needed) < most:
        node = max(todo)
        todo.remove(node)
        if marks[node] == operands:
            common.append(node)
            continue
        needed.append(node)
        for source in _tensors(node.all_input_nodes):
            marks.setdefault(source, set()).update(marks[node])
            todo.add(source)
    return [_dependent(fork, reversed(needed)) for fork in common]


def _dependent(fork: fx.Node, later: Iterable[fx.Node]) -> frozenset[fx.Node]:
    found = {fork}
    for node in later:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def _tensors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that are computed from an input of the network, or are one."""
    return {node for node in nodes if node.op != "get_attr" and not is_plain(node)}
