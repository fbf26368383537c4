"""Puts layers and constants into a graph module while it is being normalised, under free names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from rmfx.front.shapes import infer_shape


class Installer:
    """Turns nodes into calls of new layers, in place: a node keeps its name, its position and its readers.

    Args:
        gm: the graph module to change.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self._counts: dict[tuple[str, str], int] = {}
        self.device = next((tensor.device for tensor in (*gm.parameters(), *gm.buffers())), torch.device("cpu"))

    def layer(self, node: fx.Node, module: nn.Module, source: fx.Node) -> None:
        """Make ``node`` the call of ``module`` on ``source``."""
        node.target = self._add(node.meta["place"], node.name, module)
        node.op = "call_module"
        node.args, node.kwargs = (source,), {}

    def layer_before(self, node: fx.Node, module: nn.Module, source: fx.Node, word: str = "scale") -> fx.Node:
        """A new node, in front of ``node`` and named after it, that calls ``module`` on ``source``."""
        target = self._add(node.meta["place"], f"{node.name}_{word}", module)
        return self._before(node, "call_module", target, (source,), word)

    def call_before(self, node: fx.Node, function: Callable[..., Any], *operands: Any) -> fx.Node:
        """A new node, in front of ``node`` and named after it, that calls ``function`` on ``operands``."""
        return self._before(node, "call_function", function, operands, function.__name__)

    def _before(self, node: fx.Node, op: str, target: Any, args: tuple[Any, ...], word: str) -> fx.Node:
        with self.gm.graph.inserting_before(node):
            new = self.gm.graph.create_node(op, target, args, name=f"{node.name}_{word}")
        new.meta.update(place=node.meta["place"], line=node.meta.get("line"))
        infer_shape(self.gm, new)
        return new

    def constant(self, node: fx.Node, value: Tensor) -> None:
        """Make ``node`` read the constant ``value``: a parameter where it is one, else a buffer."""
        place = node.meta["place"]
        name = self.free_name(place, node.name)
        owner = self._owner(place)
        if isinstance(value, nn.Parameter):
            owner.register_parameter(name.rpartition(".")[2], value)
        else:
            owner.register_buffer(name.rpartition(".")[2], value)
        node.target = name
        node.op = "get_attr"
        node.args, node.kwargs = (), {}

    def free_name(self, place: str, word: str) -> str:
        """A qualified name in ``place`` that nothing has: ``word``, or ``word_1``, ..."""
        owner = self._owner(place)
        name, count = word, self._counts.get((place, word), 0)
        while hasattr(owner, name):
            count += 1
            name = f"{word}_{count}"
        self._counts[place, word] = count  # a word asked for a thousand times is not searched a thousand times
        return f"{place}.{name}" if place else name

    def _add(self, place: str, word: str, module: nn.Module) -> str:
        name = self.free_name(place, word)
        for part in module.modules():
            part.training = False
        self.gm.add_submodule(name, module)
        return name

    def _owner(self, place: str) -> nn.Module:
        """The module at ``place``; bare modules are made where the graph module has none yet."""
        owner: nn.Module = self.gm
        for part in filter(None, place.split(".")):
            if part not in owner._modules:
                bare = nn.Module()
                bare.training = False
                owner.add_module(part, bare)
            owner = owner.get_submodule(part)
        return owner


def clone_sharing(module: nn.Module) -> nn.Module:
    """A second module of the same class over the same parameters and buffers; changing one leaves the other."""
    clone = type(module).__new__(type(module))
    for name, value in vars(module).items():
        clone.__dict__[name] = value.copy() if isinstance(value, dict | set | list) else value
    for name, child in module._modules.items():
        clone._modules[name] = None if child is None else clone_sharing(child)
    return clone
