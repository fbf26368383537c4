"""Operations that hide a sum or a product are written out, so that everything behind sees sums and products only.

lerp(x, y, w)                 =>  x * (1 - w) + y * w
addcmul(x, a, b, value=v)     =>  x + a * b * v
addcdiv(x, a, b, value=v)     =>  x + a / b * v
stack(xs, d).sum(d)           =>  xs[0] + xs[1] + ...
stack(xs, d).mean(d)          =>  (xs[0] + xs[1] + ...) / len(xs)
glu(x, 1)                     =>  x[:, :c] * sigmoid(x[:, c:])
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

from torch import fx, nn

from rmfx.front.calls import argument
from rmfx.front.install import Installer
from rmfx.front.kind_table import infer_kinds
from rmfx.front.kinds import Kinds
from rmfx.front.opnames import op_name
from rmfx.modules import ChannelSlice

_MOST_TERMS = 16  # of a stack: a sum of more is better left to one operation


def write_out_compounds(installer: Installer) -> None:
    """Write out the operations that hide a sum or a product, in place.

    Args:
        installer: of a graph module in which nothing works in place any more.
    """
    gm = installer.gm
    kinds: Kinds | None = None
    for node in list(gm.graph.nodes):
        name = op_name(node)
        if "out" in node.kwargs:
            continue
        if name == "lerp":
            _write_lerp(installer, node)
        elif name in _PRODUCTS:
            _write_product(installer, node, _PRODUCTS[name])
        elif name in _REDUCTIONS and op_name(source := argument(node, 0, "input", None)) == "stack":
            kinds = infer_kinds(gm) if kinds is None else kinds
            _write_reduction(installer, node, source, name == "mean", kinds)
        elif (halved := _halved(gm, node)) is not None:
            kinds = infer_kinds(gm) if kinds is None else kinds
            _write_glu(installer, node, *halved, kinds)


_PRODUCTS: dict[str | None, Callable[..., Any]] = {"addcmul": operator.mul, "addcdiv": operator.truediv}
_REDUCTIONS = frozenset({"sum", "mean"})


def _halved(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, Any] | None:
    """What a gated linear unit halves, and along which dimension."""
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    if type(module) is nn.GLU and len(node.all_input_nodes) == 1:
        return node.all_input_nodes[0], module.dim
    source = argument(node, 0, "input", None) if op_name(node) == "glu" else None
    return (source, argument(node, 1, "dim", -1)) if isinstance(source, fx.Node) else None


def _write_glu(installer: Installer, node: fx.Node, source: fx.Node, dim: Any, kinds: Kinds) -> None:
    kind = kinds[source]
    if kind.rank is None or kind.rank < 2 or type(dim) is not int or dim % kind.rank != 1 or not kind.channels:
        return
    axis, width = (-1 if kind.rank == 2 else 1), kind.channels // 2
    data, gate = (
        installer.layer_before(node, ChannelSlice(start, width, axis), source, word)
        for start, word in ((0, "data"), (width, "gate"))
    )
    _become(node, operator.mul, data, installer.layer_before(node, nn.Sigmoid(), gate, "factor"))


def _write_lerp(installer: Installer, node: fx.Node) -> None:
    start, end, weight = (argument(node, at, name, None) for at, name in enumerate(("input", "end", "weight")))
    rest = installer.call_before(node, operator.sub, 1, weight) if isinstance(weight, fx.Node) else 1 - weight
    terms = [installer.call_before(node, operator.mul, *pair) for pair in ((start, rest), (end, weight))]
    _become(node, operator.add, *terms)


def _write_product(installer: Installer, node: fx.Node, operation: Callable[..., Any]) -> None:
    names = ("input", "tensor1", "tensor2")
    base, first, second = (argument(node, at, name, None) for at, name in enumerate(names))
    if len(node.args) > len(names):
        return  # the form with the factor in second place, which torch has given up
    factor = node.kwargs.get("value", 1)
    if operation is operator.mul and isinstance(second, fx.Node) and second.op == "get_attr":
        first, second = second, first  # the factor goes to a constant, where there is one
    if factor != 1:
        first = installer.call_before(node, operator.mul, first, factor)
    _become(node, operator.add, base, installer.call_before(node, operation, first, second))


def _write_reduction(installer: Installer, node: fx.Node, stack: fx.Node, averages: bool, kinds: Kinds) -> None:
    parts, axis = argument(stack, 0, "tensors", ()), argument(stack, 1, "dim", 0)
    axes = argument(node, 1, "dim", None)
    axes = [axes] if type(axes) is int else axes
    if argument(node, 2, "keepdim", False) or node.kwargs.get("dtype") is not None or "out" in stack.kwargs:
        return
    if not isinstance(parts, tuple | list) or not 1 < len(parts) <= _MOST_TERMS:
        return
    if not all(isinstance(part, fx.Node) and kinds[part].floating for part in parts):
        return  # a sum of integers is of another type than they
    ranks = {kinds[part].rank for part in parts} - {None}
    if not isinstance(axes, tuple | list) or len(axes) != 1 or not _same_axis(axis, axes[0], ranks):
        return
    *others, last = parts
    total = reduce(lambda left, right: installer.call_before(node, operator.add, left, right), others)
    if averages:
        _become(node, operator.truediv, installer.call_before(node, operator.add, total, last), len(parts))
    else:
        _become(node, operator.add, total, last)


def _same_axis(first: Any, second: Any, ranks: set[int | None]) -> bool:
    """Whether two numbers name one axis of a stack of tensors of the one rank in ``ranks``, if that is known."""
    if first == second:
        return True
    rank = next(iter(ranks)) if len(ranks) == 1 else None
    whole = type(first) is type(second) is int
    return whole and rank is not None and first % (rank + 1) == second % (rank + 1)


def _become(node: fx.Node, target: Callable[..., Any], *operands: Any) -> None:
    node.op, node.target, node.args, node.kwargs = "call_function", target, operands, {}
