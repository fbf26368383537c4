"""Graphs that Dynamo gives to the back ends of ``torch.compile``: weights come in as inputs, next to the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from rmfx.front.program import hold, open_module, plain_path

_WEIGHTS = ("._parameters[", "._buffers[")


def from_dynamo(gm: fx.GraphModule) -> bool:
    """Whether Dynamo recorded ``gm``."""
    return any("example_value" in node.meta for node in gm.graph.nodes)


def hold_weights(gm: fx.GraphModule, args: Sequence[Any]) -> fx.GraphModule:
    """``gm`` with the weights it is called with as attributes, under their names in the model.

    The inputs for weights stay, so that Dynamo can go on calling the result as it calls ``gm``; nothing reads them.

    Args:
        gm: a graph of Dynamo; left untouched.
        args: what it is called with.
    """
    sources = {node: str(getattr(source, "name", "")) for node in gm.graph.nodes if (source := _source(node))}
    opened = open_module(gm)
    old = [node for node in gm.graph.nodes if node.op == "placeholder"]
    new = [node for node in opened.graph.nodes if node.op == "placeholder"]
    if len(old) != len(new):
        return gm  # nested inputs: Dynamo makes none
    behind = new[-1].next if new else None
    for before, node, value in zip(old, new, args, strict=False):
        name = sources.get(before, "")
        if not isinstance(value, Tensor) or not any(mark in name for mark in _WEIGHTS):
            continue
        hold(opened, plain_path(name), value)
        assert behind is not None
        with opened.graph.inserting_before(behind):
            read = opened.graph.get_attr(plain_path(name))
        read.meta.update(place=plain_path(name).rpartition(".")[0], line=None, example_value=value)
        node.replace_all_uses_with(read)
    opened.recompile()
    opened.training = False
    return opened


def _source(node: fx.Node) -> Any:
    return getattr(node, "_dynamo_source", None)
