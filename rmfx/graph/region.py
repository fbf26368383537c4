"""Finds what stands between a fork and the sum where its branches join again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from rmfx.algebra.pointwise import is_pointwise
from rmfx.graph.facts import is_dropout, is_sum, module_of
from rmfx.graph.linear import dims_of, is_linear
from rmfx.graph.rule import Refusal

Chain = tuple[fx.Node, ...]


@dataclass(frozen=True)
class Region:
    """A fork, the two chains of layers that start at it, and the sum that joins them.

    ``branch`` is the longer chain (the one with nonlinearities), ``shortcut`` the other; both run from fork to
    join and exclude both. Sums inside have been removed before, so chains are all there is.
    """

    fork: fx.Node
    join: fx.Node
    branch: Chain
    shortcut: Chain

    @property
    def linear(self) -> bool:
        """Whether no nonlinearity stands between fork and join."""
        return not any(_is_nonlinear(node) for node in (*self.branch, *self.shortcut))

    @property
    def kind(self) -> str:
        """How reports call it: ``identity``, ``projection``, ``linear`` or ``nonlinear``."""
        if self.linear:
            return "linear"
        if not self.shortcut:
            return "identity"
        return "nonlinear" if any(_is_nonlinear(node) for node in self.shortcut) else "projection"

    @property
    def dims(self) -> int | None:
        """Spatial dimensions of the layers inside, or ``None`` where no layer tells."""
        return next((d for node in (*self.branch, *self.shortcut) if (d := dims_of(node)) is not None), None)


def is_residual(join: fx.Node) -> bool:
    """Whether ``join`` is a sum whose two operands depend on a common tensor."""
    if not is_sum(join):
        return False
    if len(join.all_input_nodes) == 1:
        return True
    first, second = join.all_input_nodes
    earlier, later = sorted((first, second))
    return _depends(later, earlier) or bool(_ancestors(first) & _ancestors(second))


def find_region(join: fx.Node) -> Region | Refusal:
    """The region of a residual sum, or what stands in the way of seeing one.

    Walks up from both operands, always from the later one, until they meet: the cost is the region's size.
    """
    tips: list[fx.Node] = [arg for arg in join.args if isinstance(arg, fx.Node)]
    chains: tuple[list[fx.Node], list[fx.Node]] = ([], [])
    while tips[0] is not tips[1]:
        side = 0 if tips[1] < tips[0] else 1
        node = tips[side]
        reason = obstacle(node)
        if reason is not None:
            return Refusal(node, reason)
        chains[side].append(node)
        tips[side] = node.all_input_nodes[0]
    first, second = (tuple(reversed(chain)) for chain in chains)
    if _weight(first) < _weight(second):
        first, second = second, first
    return Region(tips[0], join, first, second)


def _weight(chain: Chain) -> tuple[int, int]:
    return sum(_is_nonlinear(node) for node in chain), len(chain)


def _is_nonlinear(node: fx.Node) -> bool:
    return not is_linear(node) and not is_dropout(node)


def obstacle(node: fx.Node) -> str | None:
    """Why ``node`` cannot be one layer of a chain between fork and join, or ``None`` where it can."""
    if len(node.users) > 1:
        readers = ", ".join(sorted(user.name for user in node.users))
        return f"{_named(node)} inside the branch is read {len(node.users)} times, by {readers}"
    module = module_of(node)
    known = module is not None and (is_linear(node) or is_pointwise(module) or is_dropout(node))
    if known and len(node.all_input_nodes) == 1:
        return None
    return f"{_named(node)} stands on a branch: {_described(node)}, neither a linear nor a pointwise layer"


def _named(node: fx.Node) -> str:
    place = node.meta.get("place", "")
    return f"{node.name!r} (in {place})" if place else f"{node.name!r}"


def _described(node: fx.Node) -> str:
    """What a node is, in a user's words."""
    module = module_of(node)
    if module is not None:
        return f"a {type(module).__name__}"
    if is_sum(node):
        return "a sum that stays"
    if node.op == "placeholder":
        return "an input of the network"
    if node.op == "get_attr":
        return "a constant"
    word = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    tensors = sum(parent.op != "get_attr" for parent in node.all_input_nodes)
    return f"a {word} of {tensors} tensors" if tensors > 1 else f"a {word}"


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen = {node}
    todo = [node]
    while todo:
        for parent in todo.pop().all_input_nodes:
            if parent not in seen and parent.op != "get_attr":
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
            if parent not in seen and on < parent:
                seen.add(parent)
                todo.append(parent)
    return False
