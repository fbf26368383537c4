"""What a branch is multiplied by, or what is added to it from outside: which operand is which, and what computes it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx

from rmfx.front.calls import choice
from rmfx.graph.facts import is_plain, is_product, is_sum, module_of, shape_of

MOST_NODES = 60  # of the computation of one gate


@dataclass(frozen=True)
class GatePath:
    """``node = data * factor`` or ``node = data + factor``, where ``factor`` is computed aside; or ``data``, masked.

    Attributes:
        node, data, factor: the nodes. Of what is masked the factor is the mask.
        side: what computes the factor from ``reads``, in graph order; nothing else reads any of it.
        reads: the tensors of the branch that enter it; none where the factor does not depend on the branch's fork.
        mask: of what is masked: ``node`` is 0 where the factor is ``"false"``, or where it is ``"true"``.
    """

    node: fx.Node
    data: fx.Node
    factor: fx.Node
    side: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    mask: Literal["true", "false"] | None = None

    @property
    def outside(self) -> bool:
        """Whether the factor does not depend on the branch's fork."""
        return not self.side and not self.reads

    @property
    def neutral(self) -> float:
        """The factor that changes nothing."""
        return 0.0 if is_sum(self.node) else 1.0

    def through(self, stays: Sequence[bool]) -> GatePath:
        """The same gate, with the layers that make some of its ``reads`` on its side: those that ``stays`` marks."""
        marked = list(zip(self.reads, stays, strict=True))
        side = sorted({*self.side, *(read for read, kept in marked if kept)})
        reads = (read.all_input_nodes[0] if kept else read for read, kept in marked)
        return replace(self, side=tuple(side), reads=tuple(reads))


def gate_of(node: fx.Node, inside: Collection[fx.Node] | None = None) -> GatePath | str | None:
    """The gate of a product, or why it has none; ``None`` for what is no gate, with an outside term or mask neither.

    Args:
        inside: the tensors that depend on the branch's fork, and the fork; ``None`` where all are taken to.
    """
    if inside is not None and (is_product(node) or is_sum(node)) and len(node.all_input_nodes) == 2:
        own = [operand for operand in node.all_input_nodes if operand in inside]
        if len(own) == 1:
            (factor,) = (operand for operand in node.all_input_nodes if operand is not own[0])
            return GatePath(node, own[0], factor, (), ())
    if not is_product(node):
        masked = _read_mask(node)
        return masked if masked is not None and inside is not None and masked.factor not in inside else None
    gate = read_gate(node)
    if isinstance(gate, str) or inside is None:
        return gate
    return replace(gate, reads=tuple(read for read in gate.reads if read in inside))


def _read_mask(node: fx.Node) -> GatePath | None:
    """``x.masked_fill(mask, 0)``, ``torch.where(mask, x, 0)`` and ``torch.where(mask, 0, x)``."""
    mask, when_true, when_false = choice(node) or (None, None, None)
    if isinstance(mask, fx.Node) and isinstance(when_true, fx.Node) and _is_zero(when_false):
        return GatePath(node, when_true, mask, (), (), "false")
    if isinstance(mask, fx.Node) and isinstance(when_false, fx.Node) and _is_zero(when_true):
        return GatePath(node, when_false, mask, (), (), "true")
    return None


def _is_zero(value: object) -> bool:
    return type(value) in (int, float) and value == 0


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
