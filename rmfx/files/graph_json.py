"""A torch.fx graph as JSON, and back, with every name in it checked.

``torch.fx`` turns a graph into Python source and runs that source to define ``forward``. Node names, argument names and
targets stand in the source as they are, so each must prove to be a plain identifier or a name from a closed list before
it gets there: :func:`decode_graph` is where hostile files are stopped.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Collection
from typing import Any

from torch import fx
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from rmfx.errors import FileFormatError
from rmfx.files.values import Json, decode, encode, fields, shorten
from rmfx.files.vocabulary import ATTRIBUTES, FUNCTION_NAMES, FUNCTIONS, METHODS

KEPT_META = ("origin", "place")
_NONE = type(None)
_NODE_FIELDS = {
    "op": str,
    "name": str,
    "target": str,
    "args": list,
    "kwargs": dict,
    "meta": dict,
}
_PYTREE_FIELDS = {"names": list, "inputs": object, "outputs": object}


def encode_graph(graph: fx.Graph) -> dict[str, Json]:
    """``graph`` as JSON; of the nodes' metadata only "origin" and "place" are kept.

    Raises:
        FileFormatError: naming the node that calls something outside :mod:`rmfx.files.vocabulary`, or holds a value
            without a JSON form.
    """
    return {"nodes": [_encode_node(node) for node in graph.nodes], "pytree": _encode_pytree(graph)}


def decode_graph(data: object, layers: Collection[str], tensors: Collection[str]) -> fx.Graph:
    """The graph that :func:`encode_graph` wrote.

    Args:
        data: the JSON object.
        layers: names of the modules that a node may call.
        tensors: names of the tensors that a node may read.

    Raises:
        FileFormatError: for anything :func:`encode_graph` does not write.
    """
    entries, tree = fields(data, "graph", {"nodes": list, "pytree": (dict, _NONE)})
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    known = {"call_module": layers, "get_attr": tensors, "call_method": METHODS, "call_function": FUNCTIONS}
    for entry in entries:
        op, name, target, args, kwargs, meta = fields(entry, "node", _NODE_FIELDS)
        if op in known and target not in known[op]:
            raise FileFormatError(f"node {shorten(name)} uses {shorten(target)}, which is unknown")
        node = _create(graph, op, name, target, decode(args, nodes), _decode_kwargs(kwargs, nodes))
        node.meta.update(_checked_meta(meta))
        nodes[name] = node
    if [node.op for node in graph.nodes].count("output") != 1 or next(reversed(graph.nodes)).op != "output":
        raise FileFormatError("a graph ends with its one output")
    graph.set_codegen(CodeGen() if tree is None else _decode_pytree(tree))
    return graph


def _encode_node(node: fx.Node) -> dict[str, Json]:
    try:
        return {
            "op": node.op,
            "name": node.name,
            "target": _function_name(node) if node.op == "call_function" else str(node.target),
            "args": [encode(argument) for argument in node.args],
            "kwargs": {key: encode(argument) for key, argument in node.kwargs.items()},
            "meta": {key: node.meta[key] for key in KEPT_META if isinstance(node.meta.get(key), str)},
        }
    except FileFormatError as problem:
        place = node.meta.get("place")
        where = f" (in module {place!r})" if place else ""
        raise FileFormatError(f"cannot be saved: node {node.name!r}{where}: {problem}") from problem


def _function_name(node: fx.Node) -> str:
    name = FUNCTION_NAMES.get(node.target)  # type: ignore[arg-type]
    if name is None:
        raise FileFormatError(f"calls {_qualified(node.target)}, which is no function of the file format")
    return name


def _qualified(target: object) -> str:
    return f"{getattr(target, '__module__', '?')}.{getattr(target, '__qualname__', target)}"


def _create(graph: fx.Graph, op: str, name: str, target: str, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
    reason = _objection(op, target, args, kwargs)
    if reason:
        raise FileFormatError(f"node {shorten(name)}: {reason}")
    function: str | Callable[..., Any] = FUNCTIONS[target] if op == "call_function" else target
    node = graph.create_node(op, function, tuple(args), kwargs, name=name)
    if node.name != name:
        raise FileFormatError(f"the node name {shorten(name)} is no identifier, or taken")
    return node


def _objection(op: str, target: str, args: list[Any], kwargs: dict[str, Any]) -> str | None:
    """Why this node may not be made, ``None`` when it may."""
    if op == "placeholder":
        fits = _is_argument(target.removeprefix("*").removeprefix("*")) and len(args) <= 1 and not kwargs
        return None if fits else f"{shorten(target)} cannot be an argument of forward"
    if op == "output":
        return None if target == "output" and len(args) == 1 and not kwargs else "not an output"
    if op == "get_attr":
        return None if not args and not kwargs else "reading a tensor takes no arguments"
    if op == "call_method":
        return None if args and isinstance(args[0], fx.Node) else f"method {target} needs a tensor"
    if op == "call_function" and FUNCTIONS[target] is getattr:
        fits = len(args) == 2 and isinstance(args[0], fx.Node) and not kwargs and str(args[1]) in ATTRIBUTES
        return None if fits else f"only {', '.join(sorted(ATTRIBUTES))} can be read off a tensor"
    return None if op in ("call_function", "call_module") else f"unknown operation {shorten(op)}"


def _is_argument(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name) and name != "self"


def _decode_kwargs(kwargs: dict[str, Any], nodes: dict[str, fx.Node]) -> dict[str, Any]:
    for key in kwargs:
        if not _is_argument(key):
            raise FileFormatError(f"not a keyword argument: {shorten(key)}")
    return {key: decode(value, nodes) for key, value in kwargs.items()}


def _checked_meta(meta: dict[str, Any]) -> dict[str, str]:
    if not all(key in KEPT_META and isinstance(value, str) for key, value in meta.items()):
        raise FileFormatError(f"unknown metadata {shorten(meta)}")
    return meta


def _encode_pytree(graph: fx.Graph) -> dict[str, Json] | None:
    """How nested inputs and outputs are flattened; ``None`` for the ordinary calling convention."""
    codegen = graph._codegen
    if type(codegen) is CodeGen:
        return None
    if type(codegen) is not _PyTreeCodeGen:
        raise FileFormatError(f"cannot be saved: the graph's code is made by {type(codegen).__qualname__}")
    info = codegen.pytree_info
    outputs = None if info.out_spec is None else [_encode_spec(info.out_spec)]
    return {"names": list(info.orig_args), "inputs": _encode_spec(info.in_spec), "outputs": outputs}


def _encode_spec(spec: pytree.TreeSpec) -> Json:
    """A nest of tuples, lists and dictionaries with ``None`` for each leaf."""
    skeleton = pytree.tree_unflatten([None] * spec.num_leaves, spec)
    data = encode(skeleton)
    if pytree.tree_structure(decode(data, {})) != spec:
        raise FileFormatError("cannot be saved: inputs or outputs nest in other types than tuple, list and dict")
    return data


def _decode_pytree(data: dict[str, Any]) -> _PyTreeCodeGen:
    names, inputs, outputs = fields(data, "pytree", _PYTREE_FIELDS)
    skeleton = decode(inputs, {})
    keywords = skeleton[1] if isinstance(skeleton, tuple) and len(skeleton) == 2 else None
    given = [*names, *(keywords if isinstance(keywords, dict) else ())]
    if not all(name == "self" or _is_argument(name) for name in given):
        raise FileFormatError(f"not names of arguments: {shorten(given)}")
    if outputs is not None and (not isinstance(outputs, list) or len(outputs) != 1):
        raise FileFormatError(f"not a description of outputs: {shorten(outputs)}")
    out_spec = None if outputs is None else pytree.tree_structure(decode(outputs[0], {}))
    return _PyTreeCodeGen(_PyTreeInfo(list(names), pytree.tree_structure(skeleton), out_spec))
