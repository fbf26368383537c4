"""Example inputs: one tensor or a tuple of them, and keyword inputs, bound to the network's placeholders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from rmfx.errors import UnsupportedModelError


def as_tuple(example_inputs: Any) -> tuple[Any, ...]:
    """Positional inputs as a tuple: a single tensor may stand for itself."""
    if isinstance(example_inputs, tuple):
        return example_inputs
    if isinstance(example_inputs, list):
        return tuple(example_inputs)
    return (example_inputs,)


def bind(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Inputs in the order of the graph's placeholders.

    Raises:
        UnsupportedModelError: when there are too many inputs, an unknown keyword, or one is missing.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    names = [str(node.target) for node in placeholders]
    if len(args) > len(names):
        raise UnsupportedModelError(f"{len(args)} example inputs were given, the network takes {len(names)}: {names}")
    if unknown := [name for name in kwargs if name not in names[len(args) :]]:
        raise UnsupportedModelError(f"the network has no further input named {unknown[0]!r}: it takes {names}")
    bound = list(args)
    for node in placeholders[len(args) :]:
        if node.target in kwargs:
            bound.append(kwargs[str(node.target)])
        elif node.args:
            bound.append(node.args[0])
        else:
            raise UnsupportedModelError(f"no example input was given for {node.target!r}")
    return tuple(bound)


def describe(inputs: tuple[Any, ...]) -> str:
    """Shapes of inputs, for messages."""
    return ", ".join(_described(x) for x in inputs)


def _described(x: Any) -> str:
    if isinstance(x, Tensor):
        return str(tuple(x.shape))
    return repr(x) if isinstance(x, (bool, int, float, str, type(None))) else f"a {type(x).__name__}"
