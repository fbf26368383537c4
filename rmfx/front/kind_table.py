"""The kind of every node of a graph, kept up to date while the graph is brought into normal form."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from rmfx.front.aliasing import is_plain_value
from rmfx.front.function_kinds import function_kind
from rmfx.front.kinds import ANY, Kind, Kinds
from rmfx.front.layer_kinds import demands, layer_kind


class KindTable:
    """The kind of every node, read in graph order; a node that was changed is read again.

    Args:
        gm: the graph module; shapes and dtypes that are known of its nodes (``meta``) are used.

    >>> gm = fx.symbolic_trace(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Conv2d(3, 8, 3)))
    >>> table = KindTable(gm)
    >>> [table.read(node).sizes for node in gm.graph.nodes][:3]
    [(None, 3, None, None), (None, 3, None, None), (None, 8, None, None)]
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.kinds: Kinds = {}
        self._wanted = demands(gm)
        self._tensors: set[fx.Node] = set()

    def __getitem__(self, node: fx.Node) -> Kind:
        return self.kinds.get(node, ANY)

    def __setitem__(self, node: fx.Node, kind: Kind) -> None:
        self.kinds[node] = kind

    def read(self, node: fx.Node) -> Kind:
        """The kind of ``node``, from those of the nodes before it."""
        kind = self._kind(node)
        if kind.tensor:
            self._tensors.add(node)
            kind = _with_shape(_with_demand(kind, self._wanted.get(node, ANY)), node)
        self.kinds[node] = kind
        return kind

    def _kind(self, node: fx.Node) -> Kind:
        if node.op == "get_attr":
            return _constant_kind(self.gm, str(node.target))
        if node.op == "call_module":
            sources = node.all_input_nodes
            return layer_kind(self.gm.get_submodule(str(node.target)), self[sources[0]] if sources else ANY)
        if is_plain_value(node, self._tensors):
            return function_kind(node, self.kinds, False)
        return function_kind(node, self.kinds, True) if node.op in ("call_function", "call_method") else ANY


def infer_kinds(gm: fx.GraphModule) -> Kinds:
    """The kind of every node, from the layers that make it and from those that read it."""
    table = KindTable(gm)
    return {node: table.read(node) for node in gm.graph.nodes}


def _with_demand(kind: Kind, wanted: Kind) -> Kind:
    floating = kind.floating or wanted.floating
    if kind.rank is None and kind.value is None:
        return Kind(True, wanted.rank, floating, wanted.sizes)
    if kind.rank == wanted.rank and kind.rank:
        sizes = tuple(own if own is not None else theirs for own, theirs in zip(kind.sizes, wanted.sizes, strict=True))
        return replace(kind, floating=floating, sizes=sizes)
    return replace(kind, floating=floating)


def _with_shape(kind: Kind, node: fx.Node) -> Kind:
    shape, dtype = node.meta.get("shape"), node.meta.get("dtype")
    if shape is None:
        return kind
    floating = kind.floating or (dtype is not None and dtype.is_floating_point)
    return replace(kind, rank=len(shape), floating=floating)


def _constant_kind(gm: fx.GraphModule, target: str) -> Kind:
    value: object = gm
    for part in target.split("."):
        value = getattr(value, part)
    return Kind(True, value.dim(), value.is_floating_point(), tuple(value.shape)) if isinstance(value, Tensor) else ANY


def parameter_dtype(gm: fx.GraphModule) -> torch.dtype | None:
    """The float type that constants of the network are kept in: its widest parameter's, at least float32, if any."""
    dtypes = {parameter.dtype for parameter in gm.parameters()}
    if not dtypes:
        return None
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest
