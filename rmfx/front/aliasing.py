"""Gives every in-place operation its meaning, then makes it out of place.

``torch.fx`` records ``relu_(x)`` as a node whose result nobody needs to read: the readers of ``x`` that come later see
the new values only because memory is shared. Here each value of the graph belongs to a *cell* (the nodes that are one
and the same tensor) and each cell to one or more *roots* (allocations its memory may lie in). An in-place operation on
a cell becomes an ordinary one, and every later reader of the cell reads its result:

    x -> relu_(x)                      x -> relu(x) -> r
    x -> conv      (later)      =>     r -> conv

That is exact unless another cell may lie in the same memory (a view, or the result of an operation we do not know) and
is read later: those are refused, and so are writes into parameters and buffers. Linear in the number of nodes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

from torch import fx, nn

from rmfx.errors import NormalFormError
from rmfx.front.in_place import make_plain, refuse_wider, where, writes_by_name
from rmfx.front.opnames import (
    DISTINCT,
    FRESH,
    METADATA,
    METADATA_ATTRIBUTES,
    SPLITS,
    is_eval_dropout,
    op_name,
)
from rmfx.modules import DROPOUTS, ChannelsLast, ChannelSlice, SizeGuard

# Layers that give back what comes in, in eval mode.
NO_OPS = (nn.Identity, ChannelsLast, *DROPOUTS)
_SAME_LAYERS = (*NO_OPS, SizeGuard)
_VIEW_LAYERS = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, ChannelSlice)


@dataclass(eq=False)
class _Cell:
    """One tensor: the nodes that still stand for it, and the allocations its memory may lie in.

    ``piece`` says which part of a split tensor it is. Two parts of one split never overlap, unless the whole
    ``repeats`` itself, as what is expanded does: there, several elements may be one place in memory.
    """

    roots: tuple[_Root, ...]
    repeats: bool = False
    piece: tuple[fx.Node, int] | None = None
    nodes: list[fx.Node] = field(default_factory=list)


@dataclass(eq=False)
class _Root:
    """One allocation: every cell that may lie in it; ``constant`` names the parameter or buffer it holds."""

    constant: str | None = None
    cells: list[_Cell] = field(default_factory=list)


def resolve_in_place(gm: fx.GraphModule) -> None:
    """Rewrite ``gm`` so that nothing is in place and every reader reads what it would have seen.

    Modules are switched with ``inplace = False``: ``gm`` must own them. Nodes keep their names. Inputs of ``gm`` are
    not written either: where the original leaves another value in its caller's tensor, only the outputs are the same.

    Raises:
        NormalFormError: when a write may be seen through a view or an unknown operation, changes a parameter or
            buffer, rounds (where types are known), or has no out-of-place form; names the node, file and line.
    """
    _Resolver(gm).run()


class _Resolver:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.nodes = list(gm.graph.nodes)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.cells: dict[fx.Node, _Cell] = {}  # tensors only: what is no tensor has no cell
        self.modules = {node.target: gm.get_submodule(node.target) for node in self.nodes if node.op == "call_module"}

    def run(self) -> None:
        for node in self.nodes:
            if node.op == "output":
                continue
            if self._writes(node):
                self._resolve(node)
            else:
                self._place(node)
        for module in self.modules.values():
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]

    # -- what a node does ---------------------------------------------------------------------------------------------

    def _writes(self, node: fx.Node) -> bool:
        if self._is_same(node):
            return False
        if node.op == "call_module":
            return bool(getattr(self.modules[node.target], "inplace", False))
        if node.op not in ("call_function", "call_method"):
            return False
        return writes_by_name(node)

    def _is_same(self, node: fx.Node) -> bool:
        """Whether the result is the very tensor that comes in."""
        if node.op == "call_module":
            return isinstance(self.modules[node.target], _SAME_LAYERS)
        return is_eval_dropout(node) or (node.op == "call_method" and node.target == "requires_grad_")

    def _is_fresh(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return not isinstance(self.modules[node.target], _VIEW_LAYERS)
        return op_name(node) in FRESH

    def _repeats(self, node: fx.Node, inputs: list[_Cell]) -> bool:
        if node.op == "placeholder":
            return True  # a caller may have expanded it
        if self._is_fresh(node):
            return False
        spreads = node.op in ("call_function", "call_method") and op_name(node) not in DISTINCT
        return spreads or any(cell.repeats for cell in inputs)

    def _piece(self, node: fx.Node) -> tuple[fx.Node, int] | None:
        if node.target is not operator.getitem or type(node.args[1]) is not int or node.args[1] < 0:
            return None
        whole = node.args[0]
        if not isinstance(whole, fx.Node) or op_name(whole) not in SPLITS or self.cells[whole].repeats:
            return None
        return whole, node.args[1]

    # -- where values live --------------------------------------------------------------------------------------------

    def _inputs(self, node: fx.Node) -> list[_Cell]:
        return [self.cells[source] for source in node.all_input_nodes if source in self.cells]

    def _place(self, node: fx.Node) -> None:
        """Give the result of a node that writes nothing its cell."""
        if is_plain_value(node, self.cells):
            return
        inputs = self._inputs(node)
        if self._is_same(node) and inputs:
            self._join(node, inputs[0])
            return
        roots = () if self._is_fresh(node) else tuple(dict.fromkeys(root for cell in inputs for root in cell.roots))
        if not roots:
            roots = (_Root(str(node.target) if node.op == "get_attr" else None),)
        cell = _Cell(roots, self._repeats(node, inputs), self._piece(node))
        for root in roots:
            root.cells.append(cell)
        self._join(node, cell)

    def _join(self, node: fx.Node, cell: _Cell) -> None:
        cell.nodes.append(node)
        self.cells[node] = cell

    # -- in-place operations ------------------------------------------------------------------------------------------

    def _resolve(self, node: fx.Node) -> None:
        written = node.args[0] if node.args else node.kwargs.get("input")
        if node.kwargs.get("out") is not None or not isinstance(written, fx.Node):
            raise NormalFormError(f"{where(node)} writes into an argument: use its result instead, without out=")
        if written not in self.cells:  # counting with numbers, n += 1
            make_plain(node)
            return
        cell = self.cells[written]
        self._refuse_shared(node, cell)
        refuse_wider(node, written)
        make_plain(node)
        now = self.position[node]
        for stale in cell.nodes:
            for reader in [user for user in stale.users if self.position[user] > now]:
                reader.replace_input_with(stale, node)
        cell.nodes.clear()
        self._join(node, cell)

    def _refuse_shared(self, node: fx.Node, cell: _Cell) -> None:
        for root in cell.roots:
            if root.constant is not None:
                raise NormalFormError(
                    f"{where(node)} writes into {root.constant}, which would change the model on every call: {_ADVICE}"
                )
            for other in root.cells:
                if other is cell or _are_apart(cell, other):
                    continue
                if (reader := self._later_reader(other, self.position[node])) is not None:
                    raise NormalFormError(
                        f"{where(node)} writes into memory that {other.nodes[0].name} may share, which "
                        f"{where(reader)} reads later: {_ADVICE}"
                    )

    def _later_reader(self, cell: _Cell, now: int) -> fx.Node | None:
        for node in cell.nodes:
            for user in node.users:
                if self.position[user] > now and not _reads_metadata(user):
                    return user
        return None


def is_plain_value(node: fx.Node, tensors: dict[fx.Node, _Cell] | set[fx.Node]) -> bool:
    """Whether the node's value is surely no tensor: a size, a kind, or arithmetic on such.

    Args:
        node: the node to judge.
        tensors: those nodes before it that may be tensors.
    """
    if node.op == "call_method" and node.target in METADATA:
        return True
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in METADATA_ATTRIBUTES
    counts = getattr(node.target, "__module__", None) in ("_operator", "math", "builtins")
    return counts and not any(source in tensors for source in node.all_input_nodes)


def _are_apart(cell: _Cell, other: _Cell) -> bool:
    if cell.piece is None or other.piece is None:
        return False
    return cell.piece[0] is other.piece[0] and cell.piece[1] != other.piece[1]


def _reads_metadata(node: fx.Node) -> bool:
    return is_plain_value(node, set(node.all_input_nodes))


_ADVICE = "write the out-of-place form (y = x + z instead of x += z, inplace=False), or work on x.clone()"
