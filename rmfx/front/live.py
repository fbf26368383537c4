"""Graphs that Dynamo gives to the back ends of ``torch.compile``: weights come in as inputs, next to the real ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from rmfx.front.program import hold, open_module, plain_path, short_path

_WEIGHTS = ("._parameters[", "._buffers[")
_LOCAL = re.compile(r"^L\[['\"](\w+)['\"]\]")


def from_dynamo(gm: fx.GraphModule) -> bool:
    """Whether Dynamo recorded ``gm``."""
    return any("example_value" in node.meta for node in gm.graph.nodes)


def hold_weights(gm: fx.GraphModule, args: Sequence[Any]) -> fx.GraphModule:
    """``gm`` with the weights it is called with as attributes, under their names in the model.

    The inputs for weights stay, so that Dynamo can go on calling the result as it calls ``gm``; nothing reads them. Nor
    the inputs for sizes that are free: each size is read from the tensor that has it.

    Args:
        gm: a graph of Dynamo; left untouched.
        args: what it is called with.
    """
    paths = _paths(gm)
    opened = open_module(gm)
    old = [node for node in gm.graph.nodes if node.op == "placeholder"]
    new = [node for node in opened.graph.nodes if node.op == "placeholder"]
    if len(old) != len(new):
        return gm  # nested inputs: Dynamo makes none
    tensors = list(zip(old, new, strict=True))
    for before, node, value in zip(old, new, args, strict=False):
        node.meta["example_value"] = before.meta.get("example_value")  # it stays a graph of Dynamo
        with opened.graph.inserting_after(new[-1]):
            if before in paths and isinstance(value, Tensor):
                hold(opened, paths[before], value)
                read = opened.graph.get_attr(paths[before])
                read.meta.update(place=paths[before].rpartition(".")[0], line=None, example_value=value)
            elif (found := _with_size(before, tensors)) is not None:
                read = opened.graph.call_method("size", found)
                read.meta.update(place="", line=None, example_value=value)
            else:
                continue
        node.replace_all_uses_with(read)
    opened.recompile()
    opened.training = False
    return opened


def bind_weights(gm: fx.GraphModule, args: Sequence[Any]) -> tuple[fx.GraphModule, list[int]]:
    """The same with those inputs only that are read, and their positions among the inputs of ``gm``."""
    held = hold_weights(gm, args)
    inputs = held.graph.find_nodes(op="placeholder")
    read = [index for index, node in enumerate(inputs) if node.users]
    for node in inputs:
        if not node.users:
            held.graph.erase_node(node)
    held.recompile()
    return held, read


def weight_inputs(gm: fx.GraphModule) -> list[int]:
    """Which inputs of a graph of Dynamo are parameters and buffers of modules, by their positions."""
    inputs = (node for node in gm.graph.nodes if node.op == "placeholder")
    return [index for index, node in enumerate(inputs) if _is_weight(_source(node))]


def _with_size(node: fx.Node, tensors: list[tuple[fx.Node, fx.Node]]) -> tuple[fx.Node, int] | None:
    """Of ``tensors``, in the old and the new graph, the new one that has the free size ``node``, and its dimension."""
    size = node.meta.get("example_value")
    if not isinstance(size, torch.SymInt):
        return None
    for before, new in tensors:
        value = before.meta.get("example_value")
        shape: tuple[object, ...] = tuple(value.shape) if isinstance(value, Tensor) else ()
        for dim, other in enumerate(shape):
            if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
                return new, dim
    return None


def _paths(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """The qualified name of each weight; below the name of its model, where the graph reads several models."""
    sources = {node: source for node in gm.graph.nodes if _is_weight(source := _source(node))}
    models = {node: match[1] for node, source in sources.items() if (match := _LOCAL.match(source))}
    several = len(set(models.values())) > 1
    return {
        node: f"{models[node]}.{plain_path(source)}" if several and node in models else plain_path(source)
        for node, source in sources.items()
    }


def _is_weight(source: str) -> bool:
    return any(mark in source for mark in _WEIGHTS)


def _source(node: fx.Node) -> str:
    return short_path(str(getattr(getattr(node, "_dynamo_source", None), "name", "")))
