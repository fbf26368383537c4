"""Finds what stands between a fork and the node where everything that starts there has come together again."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from rmfx.algebra.pointwise import is_pointwise
from rmfx.graph.facts import dtype_of, is_dropout, is_plain, is_sum, module_of, shape_of
from rmfx.graph.gates import GatePath, gate_of
from rmfx.graph.linear import dims_of, is_linear
from rmfx.graph.reasons import decisive, why_not
from rmfx.graph.rule import Refusal
from rmfx.graph.stages import is_stage
from rmfx.graph.within import forks

MOST_NODES = 600  # of one region: planning takes time with their number


@dataclass(frozen=True)
class Region:
    """A fork, a join, and everything between them; nothing else reads any of that, and only gates read anything else.

    Attributes:
        fork, join: the two ends. The join is a sum or a concat.
        nodes: the operations between them, in graph order, without those that gates are computed by.
        gates: the products among them, and the sums with something that does not depend on the fork.
    """

    fork: fx.Node
    join: fx.Node
    nodes: tuple[fx.Node, ...]
    gates: tuple[GatePath, ...] = ()

    @property
    def linear(self) -> bool:
        """Whether no nonlinearity stands between fork and join, and nothing enters."""
        return not self.gates and not any(_is_nonlinear(node) for node in self.nodes)

    @property
    def kind(self) -> str:
        """How reports call it: ``identity``, ``projection``, ``linear``, ``nonlinear`` or ``concat``."""
        if self.linear:
            return "linear"
        if is_concat(self.join):
            return "concat"
        if self.fork in self.join.all_input_nodes:
            return "identity"
        return "projection" if any(self._is_linear_from_fork(arg) for arg in self.join.all_input_nodes) else "nonlinear"

    @property
    def shortcut(self) -> fx.Node | None:
        """The one operand of the join that is linear in the fork, where the others are not."""
        linear = [arg for arg in self.join.all_input_nodes if arg is self.fork or self._is_linear_from_fork(arg)]
        return linear[0] if len(linear) == 1 and not self.linear else None

    def _is_linear_from_fork(self, node: fx.Node) -> bool:
        todo, inside = [node], set(self.nodes)
        while todo:
            current = todo.pop()
            if current is self.fork:
                continue
            if current not in inside or _is_nonlinear(current):
                return False
            todo += current.all_input_nodes
        return True

    @property
    def dims(self) -> int | None:
        """Spatial dimensions of the layers inside, or ``None`` where no layer tells."""
        return next((d for node in self.nodes if (d := dims_of(node)) is not None), None)

    @property
    def sums(self) -> tuple[fx.Node, ...]:
        """The residual sums that go with it: those inside, and the join where it is one."""
        stay = {gate.node for gate in self.gates}
        return tuple(node for node in (*self.nodes, self.join) if node not in stay and is_residual(node))


def is_residual(join: fx.Node) -> bool:
    """Whether ``join`` is a sum whose two operands depend on a common tensor."""
    if not is_sum(join):
        return False
    if len(join.all_input_nodes) == 1:
        return True
    first, second = join.all_input_nodes
    earlier, later = sorted((first, second))
    return _depends(later, earlier) or bool(_ancestors(first) & _ancestors(second))


def is_concat(node: fx.Node) -> bool:
    """Whether the node is a concat in normal form."""
    return node.op == "call_function" and node.target is torch.cat and len(node.args) == 2


def find_region(join: fx.Node) -> Region | Refusal:
    """The region of a join, or what stands in the way of seeing one.

    Everything that is read between fork and join depends on the fork, or else is read by gates.
    """
    if (reason := _join_obstacle(join)) is not None:
        return _refusal(join, join, reason)
    found = _walk(join)
    if isinstance(found, Region):
        return found
    around = [_walk(join, own) for own in forks(join, MOST_NODES)]
    if regions := [region for region in around if isinstance(region, Region)]:
        return max(regions, key=lambda region: len(region.sums))
    refusals = [refusal for refusal in around if isinstance(refusal, Refusal)]
    # which knows more where the first walk went too far, or stopped at the same node
    too_far = found.node.op in ("placeholder", "get_attr")
    return next((refusal for refusal in refusals if too_far or refusal.node is found.node), found)


def _walk(join: fx.Node, own: Collection[fx.Node] | None = None) -> Region | Refusal:
    """Walks up from all operands, always from the latest, until they meet: the cost is the region's size.

    Args:
        own: the tensors that depend on the fork, and the fork: what else is read comes from outside. ``None``: all do.
    """
    todo = _tensors(join.all_input_nodes, own)
    inside: dict[fx.Node, None] = {join: None}
    gates: list[GatePath] = []
    while len(todo) > 1:
        node = max(todo)
        todo.remove(node)
        gate = gate_of(node, own)
        reason = obstacle(node, gate, inside) or (_entering(node, own) if gate is None and own is not None else None)
        if reason is not None:
            return _refusal(join, node, reason)
        inside[node] = None
        if isinstance(gate, GatePath):
            gates.append(gate)
            inside.update(dict.fromkeys(gate.side))
            todo |= _tensors((gate.data, *gate.reads), own)
        else:
            todo |= _tensors(node.all_input_nodes, own)
        if len(inside) > MOST_NODES:
            return Refusal(join, f"more than {MOST_NODES} operations stand between the fork and the join")
    if not todo:
        return Refusal(join, "nothing but constants is joined")
    (fork,) = todo
    side = {node for gate in gates for node in gate.side}
    nodes = tuple(sorted(node for node in inside if node is not join and node not in side))
    return Region(fork, join, nodes, tuple(sorted(gates, key=lambda gate: gate.node)))


def _refusal(join: fx.Node, node: fx.Node, reason: str) -> Refusal:
    """The obstacle at ``node``, unless there is one between fork and join that nothing could be done about."""
    worst = decisive(_between(join))
    return Refusal(node, reason) if worst is None else Refusal(worst, why_not(worst))


def _between(join: fx.Node) -> Iterator[fx.Node]:
    """What stands between a join and the nearest tensor that all of it is computed from, latest first."""
    todo = _tensors(join.all_input_nodes)
    for _ in range(MOST_NODES):
        if len(todo) < 2:
            return
        node = max(todo)
        todo.remove(node)
        todo |= _tensors(node.all_input_nodes)
        yield node


def _tensors(nodes: Iterable[fx.Node], own: Collection[fx.Node] | None = None) -> set[fx.Node]:
    return {node for node in nodes if not is_plain(node) and (own is None or node in own)}


def _is_nonlinear(node: fx.Node) -> bool:
    return not (is_linear(node) or is_dropout(node) or is_sum(node) or is_concat(node))


def obstacle(node: fx.Node, gate: GatePath | str | None, inside: Iterable[fx.Node]) -> str | None:
    """Why ``node`` cannot stand between a fork and a join, or ``None`` where it can.

    Args:
        gate: what :func:`rmfx.graph.gates.gate_of` says of it.
        inside: the nodes behind it that are known to be in the region.
    """
    outside = [user for user in node.users if user not in inside and not is_plain(user)]
    if outside:
        readers = ", ".join(sorted(user.name for user in outside))
        return f"{_named(node)} inside the branch is also read outside, by {readers}"
    if isinstance(gate, str):
        return f"{_named(node)} stands on a branch: {gate}"
    if gate is not None:
        return _gate_obstacle(gate)
    if is_sum(node) or is_concat(node):
        return _join_obstacle(node)
    module = module_of(node)
    known = module is not None and (is_linear(node) or is_pointwise(module) or is_dropout(node) or is_stage(node))
    if known and len(node.all_input_nodes) == 1:
        return None
    return why_not(node)


def _join_obstacle(node: fx.Node) -> str | None:
    shapes = [shape_of(arg) for arg in node.all_input_nodes]
    if any(arg.op == "get_attr" for arg in node.all_input_nodes):
        return f"{_named(node)} stands on a branch: it joins a constant"
    if is_sum(node) and None not in shapes and len(set(shapes)) > 1:
        return f"{_named(node)} broadcasts {tuple(shapes[0] or ())} with {tuple(shapes[1] or ())}"
    return None


def _entering(node: fx.Node, own: Collection[fx.Node]) -> str | None:
    outside = sorted(source.name for source in node.all_input_nodes if source not in own and not is_plain(source))
    return f"{_named(node)} reads {', '.join(outside)}, which nothing at the fork computes" if outside else None


def _gate_obstacle(gate: GatePath) -> str | None:
    shape, factor = shape_of(gate.node), shape_of(gate.factor)
    word = "adds" if is_sum(gate.node) else "multiplies" if gate.mask is None else "masks"
    if not gate.outside and "get_attr" in (gate.factor.op, gate.data.op):
        return f"{_named(gate.node)} stands on a branch: it multiplies by a constant of another shape than channels"
    if shape is None or factor is None:
        return f"{_named(gate.node)} {word} two tensors: pass example_inputs, their shapes tell which is the gate"
    if not (len(shape) == len(factor) >= 2 and shape_of(gate.data) == shape and factor[1] in (1, shape[1])):
        pair = f"{tuple(factor)} to {tuple(shape)}" if word == "adds" else f"{tuple(shape)} by {tuple(factor)}"
        return f"{_named(gate.node)} {word} {pair}, which is no gate on channels"
    mine, theirs = dtype_of(gate.data), dtype_of(gate.factor)
    masks = mine is None or theirs is None or not (theirs.is_floating_point or theirs.is_complex)
    return None if masks or mine == theirs else f"{_named(gate.node)} {word} tensors of {mine} and {theirs}"


def _named(node: fx.Node) -> str:
    place = node.meta.get("place", "")
    return f"{node.name!r} (in {place})" if place else f"{node.name!r}"


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """What the values of a node are computed from: not what only its sizes or its type are."""
    seen = {node}
    todo = [node]
    while todo:
        for parent in todo.pop().all_input_nodes:
            if parent not in seen and parent.op != "get_attr" and not is_plain(parent):
                seen.add(parent)
                todo.append(parent)
    return seen


def _depends(node: fx.Node, on: fx.Node, limit: int = 64) -> bool:
    """Whether ``on`` is a near ancestor of ``node``: settles the usual case without walking the whole network."""
    seen = {node}
    todo = [node]
    while todo and len(seen) < limit:
        for parent in todo.pop().all_input_nodes:
            if parent is on:
                return True
            if parent not in seen and on < parent and not is_plain(parent):
                seen.add(parent)
                todo.append(parent)
    return False
