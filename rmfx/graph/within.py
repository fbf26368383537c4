"""What depends on a fork: everything else that a branch reads comes from outside (a mask, a condition, a constant)."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from torch import fx

from rmfx.graph.facts import is_plain, is_product, is_sum, shape_of
from rmfx.graph.gates import GatePath, read_gate

MOST_FORKS = 64


def forks(join: fx.Node, most: int) -> list[frozenset[fx.Node]]:
    """For each tensor that all operands of ``join`` depend on: it, and what ``join`` needs of what depends on it.

    First the latest such tensors (both branches may read a condition, too), those that more depends on before others.
    Then earlier ones, where what seems to come from outside is what a later one is computed from.

    Args:
        most: nodes to look at for each.
    """
    operands = set(join.all_input_nodes)
    if operands != _tensors(operands):
        return []
    found = {fork: _own(fork, join, most) for fork in _common(operands, most)}
    latest = [fork for fork, own in found.items() if own.isdisjoint(found.keys() - {fork})]
    todo = [*sorted(latest, key=lambda fork: -len(found[fork])), *(fork for fork in found if fork not in latest)]
    for fork in todo:  # which grows
        behind = _behind(fork, found[fork], most)
        for further in _common(operands | behind, most) if behind and len(found) < MOST_FORKS else ():
            if further not in found:
                found[further] = _own(further, join, most)
                todo.append(further)
    return [found[fork] for fork in todo]


def _common(targets: Collection[fx.Node], most: int) -> list[fx.Node]:
    """The latest tensors that all ``targets`` depend on, on all ways up."""
    marks = {target: {target} for target in targets}  # which targets each node is needed for
    todo, common = set(targets), list[fx.Node]()
    for _ in range(most):
        if not todo:
            break
        node = max(todo)
        todo.remove(node)
        if len(marks[node]) == len(targets):
            common.append(node)
            continue
        for source in _tensors(node.all_input_nodes):
            marks.setdefault(source, set()).update(marks[node])
            todo.add(source)
    return common


def _own(fork: fx.Node, join: fx.Node, most: int) -> frozenset[fx.Node]:
    """The fork, and what depends on it and is needed for ``join``."""
    needed, todo = set[fx.Node](), _tensors(join.all_input_nodes)
    while todo and len(needed) < most:
        node = max(todo)
        todo.remove(node)
        if fork < node:
            needed.add(node)
            todo |= _tensors(node.all_input_nodes) - needed
    own = {fork}
    for node in sorted(needed):
        if not own.isdisjoint(node.all_input_nodes):
            own.add(node)
    return frozenset(own)


def _behind(fork: fx.Node, own: frozenset[fx.Node], most: int) -> set[fx.Node]:
    """What is read beside the fork that the fork is computed from, other than by gates and what is spread over it."""
    outside = {source for node in own if node is not fork for source in _tensors(node.all_input_nodes) - own}
    seen, todo = set[fx.Node](), {fork} if outside else set()
    while todo and len(seen) < most:
        node = max(todo)
        todo.remove(node)
        seen.add(node)
        todo |= _tensors(_data_of(node))
    return outside & seen


def _data_of(node: fx.Node) -> list[fx.Node]:
    if is_product(node) and isinstance(gate := read_gate(node), GatePath):
        return [gate.data]
    if is_sum(node):
        return [operand for operand in node.all_input_nodes if shape_of(operand) == shape_of(node)]
    return node.all_input_nodes


def _tensors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that are computed from an input of the network, or are one."""
    return {node for node in nodes if node.op != "get_attr" and not is_plain(node)}
