"""Which nodes say that they write, and the form of such a node that writes nothing."""

from __future__ import annotations

import operator

import torch
from torch import fx

from rmfx.errors import NormalFormError
from rmfx.front.opnames import NO_OUT_OF_PLACE, is_torch_function, out_of_place, parameters
from rmfx.front.tracer import IN_PLACE_OPERATORS, location

# What a write into a tensor made in forward is recorded as: torch.zeros(3) is a constant of the graph.
_IN_PLACE_METHODS = frozenset({"__setitem__", *(f"__{name}__" for name in IN_PLACE_OPERATORS)})
_INPLACE_OPERATORS = frozenset(getattr(operator, name) for name in IN_PLACE_OPERATORS)


def writes_by_name(node: fx.Node) -> bool:
    """Whether a function or method node says that it writes: a trailing underscore, an ``inplace`` or ``out``."""
    return _is_in_place_name(node) or _flag(node) is True or node.kwargs.get("out") is not None


def _is_in_place_name(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target in _INPLACE_OPERATORS:
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in _IN_PLACE_METHODS or (name.endswith("_") and not name.endswith("__"))


def _flag(node: fx.Node) -> object:
    names = parameters(node.target) if node.op == "call_function" else ()
    if "inplace" not in names:
        return None
    index = names.index("inplace")
    return node.args[index] if index < len(node.args) else node.kwargs.get("inplace")


def _clear_flag(node: fx.Node) -> None:
    if not is_torch_function(node.target):
        raise NormalFormError(f"{where(node)} is told to work in place and rmfx does not know it: pass inplace=False")
    index = parameters(node.target).index("inplace")
    if index < len(node.args):
        node.args = (*node.args[:index], False, *node.args[index + 1 :])
    else:
        node.kwargs = {**node.kwargs, "inplace": False}


def make_plain(node: fx.Node) -> None:
    """Turn an in-place node into its out-of-place form, in place in the graph.

    Raises:
        NormalFormError: when it has none.
    """
    if node.op == "call_module":
        return  # the module itself is switched at the end: other nodes may call it too
    if _flag(node) is True:
        _clear_flag(node)
    elif node.op == "call_method":
        plain = str(node.target)[:-1]
        if node.target in NO_OUT_OF_PLACE or not hasattr(torch.Tensor, plain):
            raise NormalFormError(f"{where(node)} has no out-of-place form: build the tensor with torch.where")
        node.target = plain
    else:
        function = out_of_place(node.target)
        if function is None:
            raise NormalFormError(f"{where(node)} has no out-of-place form: build the tensor with torch.where")
        node.target = function


def refuse_wider(node: fx.Node, written: fx.Node) -> None:
    """Refuse a write of wider numbers, which in place are rounded; constants take the type of what they act on."""
    own = _on_meta(written)
    for source in node.all_input_nodes:
        other = _on_meta(source)
        if own is None or other is None or source.op == "get_attr" or torch.result_type(own, other) == own.dtype:
            continue
        raise NormalFormError(
            f"{where(node)} writes {other.dtype} into {written.name}, which is {own.dtype}: cast {source.name} first"
        )


def _on_meta(node: fx.Node) -> torch.Tensor | None:
    known = {"shape", "dtype"} <= node.meta.keys()
    return torch.empty(node.meta["shape"], dtype=node.meta["dtype"], device="meta") if known else None


def where(node: fx.Node) -> str:
    """Name, operation and line of a node, for messages."""
    what = getattr(node.target, "__name__", node.target)
    return f"{node.name} ({what} at {location(node)})"
