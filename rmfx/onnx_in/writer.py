"""The torch graph that an ONNX file becomes: layers and operations under the names and places of the file."""

from __future__ import annotations

import ast
import collections
import keyword
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import onnx_ir as ir
from torch import Tensor, fx, nn

_NETWORK = fx.GraphModule(nn.Module(), fx.Graph())
_SCOPES = "pkg.torch.onnx.name_scopes"  # what torch.onnx notes at each node: the modules that it lay in


class Writer:
    """Adds layers, constants and operations to one graph.

    Every node keeps its name in the ONNX file, its place (the module it came from, where the exporter noted it), and
    the file and node as its line, so that reports and messages speak of the file.

    Args:
        file: its name.
        nodes: all nodes that will be written.
    """

    def __init__(self, file: str, nodes: Iterable[ir.Node]) -> None:
        self.root = nn.Module()
        self.root.training = False
        self.graph = fx.Graph()
        self.file = file
        self._leaves = _leaf_places(nodes)
        self._constants: dict[int, tuple[fx.Node, Tensor]] = {}
        self._words: dict[tuple[int, str], str] = {}

    def input(self, name: str) -> fx.Node:
        """A new input of the network."""
        made = self.graph.placeholder(_word(name))
        made.target = made.name  # which is unique in the graph, and no name that generated code uses
        made.meta.update(place="", line=None)
        return made

    def layer(self, node: ir.Node, module: nn.Module, source: fx.Node) -> fx.Node:
        """A call of ``module``, which is added under the place and name of ``node``."""
        place = place_of(node)
        path = place if place in self._leaves else f"{place}.{_name(node)}".lstrip(".")
        *owners, word = path.split(".")
        owner, names = self.root, []
        for part in owners:
            owner, name = self._container(owner, part)
            names.append(name)
        names.append(_free(owner, _word(word)))
        owner.add_module(names[-1], module.eval())
        made = self._made(node, "call_module", ".".join(names), (source,))
        made.meta["place"] = ".".join(owners)
        return made

    def function(self, node: ir.Node, function: Callable[..., Any], args: Sequence[Any], **kwargs: Any) -> fx.Node:
        """A call of a torch function."""
        return self._made(node, "call_function", function, tuple(args), kwargs)

    def method(self, node: ir.Node, name: str, args: Sequence[Any]) -> fx.Node:
        """A call of a tensor's method; ``args[0]`` is the tensor."""
        return self._made(node, "call_method", name, tuple(args))

    def constant(self, tensor: Tensor, name: str) -> fx.Node:
        """The node that reads ``tensor``, one for each tensor; floats with a dimension can be trained."""
        if id(tensor) not in self._constants:
            target = _free(self.root, _word(name))
            if tensor.is_floating_point() and tensor.dim():
                self.root.register_parameter(target, nn.Parameter(tensor))
            else:
                self.root.register_buffer(target, tensor)
            read = self.graph.create_node("get_attr", target, (), {})
            read.meta.update(place="", line=None)
            self._constants[id(tensor)] = (read, tensor)  # held, so that its id stays its own
        return self._constants[id(tensor)][0]

    def finish(self, outputs: Sequence[fx.Node], name: str) -> fx.GraphModule:
        """The network that gives ``outputs``: one tensor, or a tuple of them."""
        self.graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, name).eval()

    def _made(self, node: ir.Node, kind: str, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> fx.Node:
        made = self.graph.create_node(kind, target, args, kwargs or {}, _name(node))
        made.meta.update(place=place_of(node), line=(self.file, node.name or node.op_type))
        return made

    def _container(self, owner: nn.Module, part: str) -> tuple[nn.Module, str]:
        """The bare module that holds the layers of place ``part`` of ``owner``, made at its first layer."""
        name = self._words.get((id(owner), part))
        if name is None:
            name = self._words[id(owner), part] = _free(owner, _word(part))
            bare = nn.Module()
            bare.training = False
            owner.add_module(name, bare)
        return owner.get_submodule(name), name


def place_of(node: ir.Node) -> str:
    """The module that ``node`` belongs to, as both exporters of torch write it down; "" where none is known.

    >>> place_of(ir.Node("", "Conv", [], name="/layer1/layer1.0/conv1/Conv"))
    'layer1.0.conv1'
    """
    scopes = node.metadata_props.get(_SCOPES)
    if scopes is not None:
        return _last_scope(scopes)
    place: list[str] = []
    for part in (node.name or "").split("/")[1:-1]:
        # TorchScript writes "layer1", then "layer1.0", then "conv1": a part may repeat the one before it.
        if place and part.startswith(f"{place[-1]}."):
            place.pop()
        place.append(part)
    return ".".join(place)


def _last_scope(scopes: str) -> str:
    try:
        parts = ast.literal_eval(scopes)
    except (ValueError, SyntaxError):
        return ""
    # The last entry is the operation itself.
    return str(parts[-2]) if isinstance(parts, list) and len(parts) > 1 else ""


def _leaf_places(nodes: Iterable[ir.Node]) -> frozenset[str]:
    """Places that one node has for itself: they were a single layer, whose name the new one takes."""
    counted = collections.Counter(place_of(node) for node in nodes)
    parents = {place.rpartition(".")[0] for place in counted}
    for place in tuple(parents):
        while place := place.rpartition(".")[0]:
            parents.add(place)
    return frozenset(place for place, count in counted.items() if place and count == 1 and place not in parents)


def _name(node: ir.Node) -> str:
    return _word(node.name or node.op_type.lower())


def _word(name: str) -> str:
    """``name`` without what may not stand in the name of a module."""
    word = re.sub(r"\W+", "_", name.rpartition("/")[2]).strip("_") or "value"
    return f"{word}_" if keyword.iskeyword(word) or word == "self" else word


def _free(owner: nn.Module, word: str) -> str:
    """``word``, or with a number behind it where ``owner``, or the finished network, has something of that name."""
    name, count = word, 0
    while hasattr(owner, name) or hasattr(_NETWORK, name):
        count += 1
        name = f"{word}_{count}"
    return name
