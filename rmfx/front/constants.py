"""Computes at once what depends on parameters and buffers only, such as ``self.gamma.view(1, -1, 1, 1)``.

DiracNet, weight standardisation and layer scale compute weights in ``forward``. Their value is the same on every call
in eval mode, so it becomes a parameter (or a buffer, where no parameter takes part) that the rules can read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from rmfx.algebra.exact import in_float64, remember
from rmfx.errors import NormalFormError
from rmfx.front.install import Installer
from rmfx.front.opnames import FRESH, METADATA, VIEWS, op_name
from rmfx.front.tracer import location

_ATTRIBUTES = frozenset({"shape", "ndim", "data", "T", "mT"})
_FOLDED = (FRESH | VIEWS | METADATA) - {"rrelu", "batch_norm", "instance_norm", "scaled_dot_product_attention"}


@torch.no_grad()
def fold_constants(gm: fx.GraphModule, installer: Installer) -> None:
    """Replace every constant tensor expression by a ``get_attr``, and every constant number by itself.

    Args:
        gm: a graph module in which nothing is in place any more.
        installer: where new constants are put.

    Raises:
        NormalFormError: when a constant expression cannot be computed; names the node and line.
    """
    known: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            known[node] = _attribute(gm, node)
        elif _is_constant(node, known):
            known[node] = _compute(node, known)
    for node, value in known.items():
        needed = [user for user in node.users if user not in known]
        if node.op == "get_attr" or not needed:
            continue
        if isinstance(value, Tensor):
            installer.constant(node, value)
        elif _is_literal(value):
            for user in needed:
                _write_out(user, node, value)


def _attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _is_constant(node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    sources = node.all_input_nodes
    if not sources or not all(source in known for source in sources):
        return False
    if node.target is getattr:
        return node.args[1] in _ATTRIBUTES
    return op_name(node) in _FOLDED or _is_weight_norm(node)


def _is_weight_norm(node: fx.Node) -> bool:
    """Whether a batch norm standardises weights: without running statistics, it writes nowhere."""
    stats = (node.args[1:3], node.kwargs.get("running_mean"), node.kwargs.get("running_var"))
    return op_name(node) == "batch_norm" and stats in (((None, None), None, None), ((), None, None))


def _compute(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda source: known[source])
    call: Callable[..., Any] = node.target if callable(node.target) else partial(_call_method, node.target)
    try:
        value = call(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise NormalFormError(
            f"{node.name} ({location(node)}) cannot be computed from its constants: {error}"
        ) from error
    parameters = [known[source] for source in node.all_input_nodes if isinstance(known[source], nn.Parameter)]
    if isinstance(value, Tensor) and value.is_floating_point() and parameters:
        value = nn.Parameter(value.detach(), requires_grad=any(parameter.requires_grad for parameter in parameters))
    _remember(value, partial(in_float64, call, args, kwargs), pytree.tree_leaves((args, kwargs)))
    return value


def _remember(value: Any, unrounded: Callable[[], Any], given: list[Any]) -> None:
    """Let a new tensor know its value in float64; what is handed on, such as a part of a tuple, knows it already."""
    if isinstance(value, tuple | list):
        for index, part in enumerate(value):
            _remember(part, lambda index=index: unrounded()[index], given)  # type: ignore[misc]
    elif isinstance(value, Tensor) and not any(value is source for source in given):
        remember(value, unrounded)


def _call_method(name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(value, name)(*args, **kwargs)


def _is_literal(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_literal(item) for item in value)
    return isinstance(value, bool | int | float | str)


def _write_out(user: fx.Node, node: fx.Node, value: Any) -> None:
    literal = tuple(value) if isinstance(value, tuple) else value
    user.args = map_arg(user.args, lambda source: literal if source is node else source)
    user.kwargs = map_arg(user.kwargs, lambda source: literal if source is node else source)
