"""Spells the operators of ATen as the functions of ``torch`` that the normal form knows.

``torch.export``, Dynamo's back ends and ``make_fx`` record overloads such as ``aten.conv2d.default`` or, decomposed,
``aten.convolution.default`` and ``aten.addmm.default``. Most have a function of ``torch`` with the same arguments; a
table (:mod:`rmfx.front.aten_table`) holds the others. What neither knows stays an operator, like a user's function.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import map_arg

from rmfx.front.aten_table import TABLE


def has_aten(graph: fx.Graph) -> bool:
    """Whether ``graph`` calls operators of ATen by overload."""
    return any(isinstance(node.target, OpOverload) for node in graph.nodes)


def spell_aten(old: fx.Graph) -> fx.Graph:
    """A copy of ``old`` in which functions and methods of torch stand for the operators of ATen.

    Args:
        old: a graph whose nodes have their (fake) value in ``meta["val"]`` where it is known. Names and meta are kept.

    >>> graph = fx.Graph()
    >>> x = graph.placeholder("x")
    >>> _ = graph.output(graph.call_function(torch.ops.aten.relu.default, (x,)))
    >>> [node.target is torch.relu for node in spell_aten(graph).nodes]
    [False, True, False]
    """
    return _Speller(old).run()


class _Speller:
    def __init__(self, old: fx.Graph) -> None:
        self.old, self.new = old, fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.node: fx.Node = next(iter(old.nodes))  # the one that is being spelled
        self.device: fx.Node | None = None

    def run(self) -> fx.Graph:
        for node in self.old.nodes:
            self.node = node
            args, kwargs = map_arg((node.args, dict(node.kwargs)), self.values.__getitem__)
            if node.op == "call_function" and node.target is operator.getitem and isinstance(args[0], tuple):
                self.values[node] = args[0][args[1]]
            elif isinstance(node.target, OpOverload) and node.target.namespace == "aten":
                self.values[node] = self._spell(node, args, kwargs)
            elif node.op == "output":
                self.new.output(args[0])
            else:
                self.values[node] = self._make(node.op, node.target, args, kwargs)
        return self.new

    # -- making nodes -------------------------------------------------------------------------------------------------

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of ``function`` in the place of the node that is being spelled."""
        return self._make("call_function", function, args, kwargs)

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a tensor's method."""
        return self._make("call_method", name, args, kwargs)

    def _make(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.new.create_node(op, target, tuple(args), kwargs, self.node.name)
        node.meta = dict(self.node.meta)
        return node

    def value(self, node: Any) -> Any:
        """What is known of a node's value: a fake tensor, a size, or ``None``."""
        return node.meta.get("val") if isinstance(node, fx.Node) else node

    # -- one operator -------------------------------------------------------------------------------------------------

    def _spell(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert isinstance(node.target, OpOverload)
        kwargs = {key: value for key, value in kwargs.items() if value is not None and key not in _IGNORED}
        if isinstance(kwargs.get("device"), torch.device):
            kwargs["device"] = self._device(kwargs["device"])
        name = node.target._schema.name.removeprefix("aten::")
        special = TABLE.get(f"{name}.{node.target._overloadname}", TABLE.get(name))
        if special is not None:
            spelled = special(self, _bound(node.target, args, kwargs))
            if spelled is not None:
                return spelled
        for home in (torch, torch._C._nn):
            function: Any = getattr(home, name, None)
            if _is_builtin(function):
                return self.call(function, *args, **kwargs)
        if hasattr(Tensor, name) and args and isinstance(args[0], fx.Node):
            return self.method(name, *args, **kwargs)
        return self.call(node.target, *args, **kwargs)

    def _device(self, device: torch.device) -> Any:
        """Tensors that ``forward`` makes where its input lies follow it there."""
        first = next((node for node in self.new.nodes if node.op == "placeholder"), None)
        known = self.value(first)
        if first is None or not isinstance(known, Tensor) or known.device != device:
            return device
        if self.device is None:
            self.device = self.new.create_node("call_function", getattr, (first, "device"), {}, "device")
            self.device.meta = {"place": "", "line": None}
        return self.device


_IGNORED = frozenset({"pin_memory", "layout"})


def _is_builtin(function: Any) -> bool:
    return function is not None and type(function).__name__ == "builtin_function_or_method"


def _bound(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SimpleNamespace:
    """The arguments of a call by the names of the operator's schema, defaults filled in."""
    bound = {argument.name: argument.default_value for argument in target._schema.arguments}
    bound |= dict(zip(bound, args, strict=False)) | kwargs
    return SimpleNamespace(**{_INPUT.get(name, name): value for name, value in bound.items()})


_INPUT = {"self": "x", "input": "x"}
