"""Example inputs: one tensor or a tuple of them, and keyword inputs, bound to the network's placeholders."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from rmfx.errors import UnsupportedModelError


def as_tuple(example_inputs: Any) -> tuple[Any, ...]:
    """Positional inputs as a tuple: a single tensor may stand for itself."""
    if isinstance(example_inputs, tuple):
        return example_inputs
    if isinstance(example_inputs, list):
        return tuple(example_inputs)
    return (example_inputs,)


def optional_inputs(model: nn.Module) -> tuple[str, ...]:
    """Names of the inputs that are ``None`` where they are not given, in order.

    >>> optional_inputs(nn.Transformer(8, 2, 1, 1, 8))[:2]
    ('src_mask', 'tgt_mask')
    """
    return tuple(name for name, parameter in _parameters(model).items() if parameter.default is None)


def input_names(model: nn.Module) -> tuple[str, ...]:
    """Names of all inputs of ``model``, in order; none where some cannot be given by name."""
    return tuple(_parameters(model))


def without_absent(
    model: object, example_inputs: Any, kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...] | None, dict[str, Any]]:
    """Example inputs without those that are ``None`` and would be so by default: the network has no such inputs then.

    What comes behind one by position is given by name.

    >>> class Net(nn.Module):
    ...     def forward(self, x, mask=None, scale=None): ...
    >>> without_absent(Net(), (1, None, 2), {})
    ((1,), {'scale': 2})
    """
    kwargs = dict(kwargs)
    if not isinstance(model, nn.Module) or (example_inputs is None and not kwargs):
        return None if example_inputs is None else as_tuple(example_inputs), kwargs
    args = () if example_inputs is None else as_tuple(example_inputs)
    optional, names = optional_inputs(model), input_names(model)
    absent = [at for at, (name, x) in enumerate(zip(names, args, strict=False)) if x is None and name in optional]
    if absent and len(args) <= len(names):
        kwargs |= dict(zip(names[absent[0] :], args[absent[0] :], strict=False))
        args = args[: absent[0]]
    return args, {name: x for name, x in kwargs.items() if not (x is None and name in optional)}


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Those of its ``forward`` that have a name; none where some have no name, or cannot be given one."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (AttributeError, TypeError, ValueError):
        return {}  # of what is no module, or whose forward is no function of Python, nothing is known
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return parameters if all(p.kind in named for p in parameters.values()) else {}


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
