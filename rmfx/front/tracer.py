"""The symbolic tracer: plain ``torch.fx`` plus what it loses.

``y += x`` stays an in-place operation (plain fx records an addition and forgets that every alias of ``y`` changed),
``y[...] = x`` and ``y.attribute = x`` are errors instead of lost writes, parameters and buffers are always read
through the graph (so that tracing can never write into them), and each node knows its place in the model and the
line of the user's code that made it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from numbers import Number
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument
from torch.fx.proxy import Attribute, TraceError

_TORCH = str(Path(torch.__file__).parent / "_")[:-1]
_RMFX = str(Path(__file__).parents[1] / "_")[:-1]
_RMFX_MODELS = str(Path(__file__).parents[1] / "models" / "_")[:-1]  # networks are user code, wherever they are kept

Line = tuple[str, int]


def is_user_file(filename: str) -> bool:
    """Whether ``filename`` holds code of the model: not torch's, not ours, and not made up by an interpreter."""
    if filename.startswith("<"):
        return False
    return not filename.startswith(_TORCH) and (not filename.startswith(_RMFX) or filename.startswith(_RMFX_MODELS))


def is_leaf(module: nn.Module) -> bool:
    """Whether tracing keeps a call of ``module`` as one ``call_module`` node.

    Layers of ``torch.nn`` and of :mod:`rmfx.modules` are kept, unless their ``forward`` was replaced. So is a batch
    norm's subclass that inherits ``forward``: stepping into it would fail on the rank check of ``torch.nn``.
    """
    if "forward" in vars(module) or type(module).forward is nn.Module.forward:
        return False  # lists and dictionaries of modules have none: what they hold is called
    home = type(module).__module__
    if home == "rmfx.modules":
        return True
    if home.startswith(("torch.nn", "torch.ao.nn")):
        return not isinstance(module, nn.Sequential)
    return isinstance(module, _NORMS) and type(module).forward is nn.BatchNorm2d.forward


_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class InPlaceProxy(fx.Proxy):
    """A proxy on which ``+=`` and its kin are recorded and other writes are errors."""

    __array_ufunc__ = None  # numpy's numbers leave arithmetic with a tensor to the tensor

    def __setitem__(self, key: object, value: object) -> None:
        raise TraceError("a write into a part of a tensor, x[...] = value, cannot be followed")

    def __delitem__(self, key: object) -> None:
        raise TraceError("del x[...] cannot be followed")

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("node", "tracer", "root", "attr", "_node", "tensor"):
            raise TraceError(f"setting the attribute .{name} of a tensor cannot be followed")
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Attribute:
        return _InPlaceAttribute(self, name)


class _InPlaceAttribute(InPlaceProxy, Attribute):
    """What reading an attribute of a proxy gives: a method about to be called, or a value."""

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        Attribute.__init__(self, root, attr)

    node = Attribute.node  # made lazily: most attributes are methods, which need no node of their own
    __call__ = Attribute.__call__


class _TensorProxy(InPlaceProxy):
    """A parameter or buffer: read through the graph, but its sizes, and its value as a number, are constants."""

    tensor: Tensor

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.tensor = tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def ndim(self) -> int:
        return self.tensor.dim()

    def dim(self) -> int:
        return self.tensor.dim()

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.tensor.shape if dim is None else self.tensor.shape[dim]

    def numel(self) -> int:
        return self.tensor.numel()

    def __len__(self) -> int:
        return len(self.tensor)

    def __bool__(self) -> bool:
        return bool(self.tensor)

    def __int__(self) -> int:
        return int(self.tensor)

    def __float__(self) -> float:
        return float(self.tensor)

    def item(self) -> int | float | bool:
        return self.tensor.item()


def _recorder(function: Callable[..., Any]) -> Callable[[fx.Proxy, object], fx.Proxy]:
    def record(self: fx.Proxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


# Not @=: tensors have none, so Python computes y @ x and binds it to a new tensor, which fx follows rightly.
_IN_PLACE_OPERATORS = "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift"
IN_PLACE_OPERATORS = tuple(_IN_PLACE_OPERATORS.split())
for _name in IN_PLACE_OPERATORS:
    setattr(InPlaceProxy, f"__{_name}__", _recorder(getattr(operator, _name)))


class Tracer(fx.Tracer):
    """Traces one model; use a new tracer for each.

    Every node gets ``meta["place"]``, the qualified name of the module whose ``forward`` made it, and ``meta["line"]``,
    file and line number there.
    """

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:  # type: ignore[override]
        """The graph of ``root``; parameters and buffers are looked up by identity, in constant time."""
        tensors = [*root.named_parameters(), *root.named_buffers()]
        self._names = {id(tensor): name for name, tensor in reversed(tensors)}
        self._proxies: dict[str, fx.Proxy] = {}
        return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See :func:`is_leaf`."""
        return is_leaf(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The proxy that stands for ``node``."""
        return InPlaceProxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Parameters and buffers read from a module become ``get_attr`` nodes, one for each."""
        name = self._names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in self._proxies:
            node = self.create_node("get_attr", name, (), {})
            self._proxies[name] = _TensorProxy(node, self, attr_val)
        return self._proxies[name]

    def create_arg(self, a: Any) -> Argument:
        """What stands in the graph for the argument ``a``."""
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and id(a) in self._names:
            return self.create_node("get_attr", self._names[id(a)], (), {})
        if type(a).__module__ == "numpy" and isinstance(a, Number):
            return a.item()  # type: ignore[attr-defined]  # code that is generated from the graph knows no numpy
        return super().create_arg(a)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> fx.Node:
        """Record one operation, with its place and line."""
        node = super().create_node(kind, target, args, kwargs, *rest, **named)
        stack = [path for path, _ in self.module_stack.values()]
        if kind == "call_module":
            stack.pop()  # the layer itself: its place is the module that calls it
        node.type = None  # annotations that are strings would make the result impossible to pickle
        node.meta["place"] = stack[-1] if stack else ""
        node.meta["line"] = _user_line(sys._getframe(1))
        return node


def _user_line(frame: FrameType | None) -> Line | None:
    while frame is not None and frame.f_code is not Tracer.trace.__code__:
        if is_user_file(frame.f_code.co_filename):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return None


def location(node: fx.Node) -> str:
    """Where the user's code makes ``node``, for error messages: ``"model.py:12, in layer1.0"``, or only the place.

    >>> graph = fx.Graph()
    >>> node = graph.placeholder("x")
    >>> node.meta.update(line=("model.py", 12), place="layer1.0")
    >>> location(node)
    'model.py:12, in layer1.0'
    """
    line, place = node.meta.get("line"), node.meta.get("place")
    where = f"{line[0]}:{line[1]}" if line else "no line of source known"
    return f"{where}, in {place}" if place else where
