"""Gives the arguments of torch's operators torch's own names, where the code has NumPy's: ``axis=1`` is ``dim=1``."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, fx

from rmfx.front.opnames import op_name, parameters

# What torch's argument parser takes besides its own names (numpy_compatibility_arg_names).
_NUMPY = {"axis": "dim", "keepdims": "keepdim", "x": "input", "a": "input", "x1": "input", "x2": "other"}


def spell_keywords(gm: fx.GraphModule) -> None:
    """Rename the keyword arguments that have NumPy's names, in place.

    >>> gm = fx.symbolic_trace(lambda x: torch.sum(x, axis=1, keepdims=True))
    >>> spell_keywords(gm)
    >>> [node.kwargs for node in gm.graph.nodes if node.kwargs]
    [{'dim': 1, 'keepdim': True}]
    """
    for node in gm.graph.nodes:
        if not _NUMPY.keys().isdisjoint(node.kwargs) and (name := op_name(node)) is not None and _is_builtin(node):
            own = _own_names(name)
            node.kwargs = {key if key in own else _NUMPY.get(key, key): value for key, value in node.kwargs.items()}


def _is_builtin(node: fx.Node) -> bool:
    """Whether torch's argument parser reads the call: functions that are written in Python take their names only."""
    return not parameters(getattr(Tensor, node.target, None) if isinstance(node.target, str) else node.target)


@cache
def _own_names(name: str) -> frozenset[str]:
    """All argument names of an operator itself: ``torch.cosine_similarity`` really has ``x1`` and ``x2``."""
    operator = getattr(torch.ops.aten, name, None)
    overloads = [] if operator is None else [getattr(operator, overload) for overload in operator.overloads()]
    return frozenset(argument.name for overload in overloads for argument in overload._schema.arguments)
