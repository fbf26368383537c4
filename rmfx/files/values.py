"""Constants and arguments as JSON: every Python value that a saved graph may hold, and no other.

``None``, booleans, integers, finite floats, strings and lists are themselves. Everything else is an object with exactly
one key, its tag: ``{"tuple": [1, 1]}``, ``{"float": "inf"}``, ``{"slice": [null, 3, null]}``, ``{"dict": [["a", 1]]}``,
``{"dtype": "torch.float32"}``, ``{"device": "cuda:0"}``, ``{"memory_format": "torch.channels_last"}``,
``{"ellipsis": "Ellipsis"}``, ``{"node": "relu_1"}``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from rmfx.errors import FileFormatError

Json = None | bool | int | float | str | list[Any] | dict[str, Any]
Nodes = Mapping[str, fx.Node]

MAX_DEPTH = 64  # graphs nest a handful of levels; a file that nests deeper wants to exhaust the stack

_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_FORMATS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.memory_format)}
_PART = re.compile(r"(?!__)[\w+/: -]+")
_PLAIN = (bool, int, str, type(None))
# Types whose str() says everything; floats here are infinite or no number.
_BY_TEXT: tuple[tuple[type, str], ...] = (
    (float, "float"),
    (fx.Node, "node"),
    (torch.dtype, "dtype"),
    (torch.device, "device"),
    (torch.memory_format, "memory_format"),
    (type(Ellipsis), "ellipsis"),
)


def encode(value: object, depth: int = 0) -> Json:
    """``value`` as JSON.

    Raises:
        FileFormatError: when ``value`` holds a type that the format does not know, or nests too deep.

    >>> encode((1, [2.5, float("inf")], slice(None, 3)))
    {'tuple': [1, [2.5, {'float': 'inf'}], {'slice': [None, 3, None]}]}
    """
    if depth > MAX_DEPTH:
        raise FileFormatError(f"a value nests deeper than {MAX_DEPTH} levels")
    if type(value) in _PLAIN or (isinstance(value, float) and math.isfinite(value)):
        return value  # type: ignore[return-value]
    if isinstance(value, list):
        return [encode(item, depth + 1) for item in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [encode(item, depth + 1) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_key(key), encode(item, depth + 1)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encode(part, depth + 1) for part in (value.start, value.stop, value.step)]}
    for kind, tag in _BY_TEXT:
        if isinstance(value, kind):
            return {tag: str(value)}
    raise FileFormatError(f"a value of type {type(value).__module__}.{type(value).__qualname__} has no JSON form")


def decode(data: object, nodes: Nodes, depth: int = 0) -> Any:
    """The value that :func:`encode` wrote; ``nodes`` are the graph's nodes so far, by name.

    Raises:
        FileFormatError: when ``data`` is not something :func:`encode` writes, or names an unknown node.

    >>> decode({"tuple": [1, {"float": "-inf"}]}, {})
    (1, -inf)
    """
    if depth > MAX_DEPTH:
        raise FileFormatError(f"a value nests deeper than {MAX_DEPTH} levels")
    if type(data) in (*_PLAIN, float):
        return data
    if isinstance(data, list):
        return [decode(item, nodes, depth + 1) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise FileFormatError(f"not a tagged value: {shorten(data)}")
    [(tag, content)] = data.items()
    if tag not in _DECODERS:
        raise FileFormatError(f"unknown kind of value {shorten(tag)}")
    return _DECODERS[tag](content, nodes, depth + 1)


def shorten(data: object) -> str:
    """``repr(data)``, cut to a length that fits a message."""
    text = repr(data)
    return text if len(text) <= 80 else text[:77] + "..."


def fields(entry: object, what: str, types: Mapping[str, Any]) -> list[Any]:
    """The values of the JSON object ``entry``, in the order of ``types``.

    Raises:
        FileFormatError: unless ``entry`` has exactly these keys, with values of these types.

    >>> fields({"name": "a", "grad": True}, "tensor", {"name": str, "grad": bool})
    ['a', True]
    """
    if not isinstance(entry, dict) or entry.keys() != types.keys():
        raise FileFormatError(f"a {what} has the fields {', '.join(types)}; got {shorten(entry)}")
    for key, expected in types.items():
        if not isinstance(entry[key], expected):
            raise FileFormatError(f"field {key!r} of a {what} cannot be {shorten(entry[key])}")
    return [entry[key] for key in types]


def check_path(path: str) -> tuple[str, str]:
    """Split a dotted name into its owner and its last part.

    Raises:
        FileFormatError: for empty parts, double underscores in front, and characters that could break out of
            generated code.

    >>> check_path("layer1.0.conv")
    ('layer1.0', 'conv')
    """
    parts = path.split(".")
    if len(parts) > MAX_DEPTH or not all(_PART.fullmatch(part) for part in parts):
        raise FileFormatError(f"not a name of a module or tensor: {shorten(path)}")
    owner, _, key = path.rpartition(".")
    return owner, key


def _key(key: object) -> str | int:
    if type(key) not in (str, int):
        raise FileFormatError(f"a dictionary key of type {type(key).__qualname__} has no JSON form")
    return key  # type: ignore[return-value]


def _list(content: object, nodes: Nodes, depth: int, length: int | None = None) -> list[Any]:
    if not isinstance(content, list) or (length is not None and len(content) != length):
        raise FileFormatError(f"expected a list{f' of {length}' if length else ''}, got {shorten(content)}")
    return [decode(item, nodes, depth) for item in content]


def _tuple(content: object, nodes: Nodes, depth: int) -> tuple[Any, ...]:
    return tuple(_list(content, nodes, depth))


def _slice(content: object, nodes: Nodes, depth: int) -> slice:
    return slice(*_list(content, nodes, depth, length=3))


def _dict(content: object, nodes: Nodes, depth: int) -> dict[str | int, Any]:
    if not isinstance(content, list):
        raise FileFormatError(f"expected a list of pairs, got {shorten(content)}")
    pairs = [_list(pair, nodes, depth, length=2) for pair in content]
    return {_key(key): value for key, value in pairs}


def _node(content: object, nodes: Nodes, depth: int) -> fx.Node:
    if not isinstance(content, str) or content not in nodes:
        raise FileFormatError(f"there is no earlier node {shorten(content)}")
    return nodes[content]


def _float(content: object, nodes: Nodes, depth: int) -> float:
    if content not in ("inf", "-inf", "nan"):
        raise FileFormatError(f"not a float: {shorten(content)}")
    return float(str(content))


def _device(content: object, nodes: Nodes, depth: int) -> torch.device:
    try:
        return torch.device(content)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as problem:
        raise FileFormatError(f"not a device: {shorten(content)}") from problem


def _ellipsis(content: object, nodes: Nodes, depth: int) -> Any:
    return Ellipsis


def _one_of(table: Mapping[str, Any]) -> Callable[[object, Nodes, int], Any]:
    def look_up(content: object, nodes: Nodes, depth: int) -> Any:
        if not isinstance(content, str) or content not in table:
            raise FileFormatError(f"unknown name {shorten(content)}")
        return table[content]

    return look_up


_DECODERS: dict[str, Callable[[object, Nodes, int], Any]] = {
    "tuple": _tuple,
    "dict": _dict,
    "slice": _slice,
    "float": _float,
    "node": _node,
    "dtype": _one_of(_DTYPES),
    "memory_format": _one_of(_FORMATS),
    "device": _device,
    "ellipsis": _ellipsis,
}
