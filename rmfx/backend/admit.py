"""Which graphs of Dynamo rmfx leaves to the inner back end, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_symbols

from rmfx.backend.settings import Settings
from rmfx.errors import RmfxError
from rmfx.front.live import bind_weights, weight_inputs
from rmfx.report import Report

_HARMLESS = (torch._C._log_api_usage_once,)  # forward of torchvision's StochasticDepth


def by_design(gm: fx.GraphModule) -> str | None:
    """Why ``gm`` is not meant to be converted, where it is not."""
    if torch.is_grad_enabled():
        return "gradients are enabled: weights are bound under torch.no_grad() and torch.inference_mode() only"
    if not weight_inputs(gm):
        return "it reads no parameters or buffers"
    return None


def refusal(gm: fx.GraphModule, args: Sequence[Any], settings: Settings) -> str | None:
    """Why ``gm`` cannot be converted, where it cannot be.

    Args:
        gm: a graph of Dynamo.
        args: what it is called with, weights with their values; sizes that are inputs may be symbols.
        settings: how it would be converted.
    """
    if reason := _obstacle(gm, args):
        return reason
    numbers = concrete(args)
    if numbers is None:
        return "a size among its inputs is known only when it runs"
    held, read = bind_weights(gm, numbers)
    try:
        return _size_obstacle(gm, settings.explain(held, tuple(numbers[index] for index in read)))
    except RmfxError as error:
        return str(error)


def concrete(args: Sequence[Any]) -> tuple[Any, ...] | None:
    """``args`` with a number for each symbol, without specialising on it; ``None`` where a symbol has no value yet."""
    numbers = tuple(value.node.hint if isinstance(value, torch.SymInt) else value for value in args)
    return None if any(number is None for number in numbers) else numbers


def has_free_sizes(gm: fx.GraphModule) -> bool:
    """Whether Dynamo's guards let inputs of several layouts pass: some size or stride of one is a symbol."""
    values = [node.meta.get("example_value") for node in gm.graph.find_nodes(op="placeholder")]
    return any(isinstance(value, Tensor | torch.SymInt) and free_symbols(value) for value in values)


def _obstacle(gm: fx.GraphModule, args: Sequence[Any]) -> str | None:
    """What in ``gm`` a graph over bound weights would get wrong."""
    if torch._C._is_any_autocast_enabled():
        return "under torch.autocast it computes in another type than its weights have"
    for index in weight_inputs(gm):
        if not _is_plain(args[index]):
            return f"the weight {_name(gm, index)} is no plain tensor with values"
    for node in gm.graph.nodes:
        if node.op == "placeholder" and _is_written(node):
            return f"it writes into its input {node.name}"
        makes_tensor = isinstance(node.meta.get("example_value"), Tensor)
        if node.op.startswith("call") and not (node.users or makes_tensor or node.target in _HARMLESS):
            return f"{node.name} has an effect other than its result"
    return _returned_weight(gm)


def _size_obstacle(gm: fx.GraphModule, report: Report) -> str | None:
    """A conversion that holds at some sizes only does not do for a graph whose sizes are free."""
    conditions = [*report.size_conditions, *report.image_conditions]
    first = 0 if report.size_conditions else 1  # those of images are of spatial sizes
    for node in gm.graph.nodes:
        value = node.meta.get("example_value") if node.op == "placeholder" else None
        if conditions and isinstance(value, Tensor) and any(isinstance(n, torch.SymInt) for n in value.shape[first:]):
            return f"sizes of {node.name} are free, and {'; '.join(conditions)}"
    return None


def _is_plain(value: Any) -> bool:
    is_dense = isinstance(value, Tensor) and value.layout is torch.strided and not isinstance(value, FakeTensor)
    return is_dense and not torch.utils._python_dispatch.is_traceable_wrapper_subclass(value)


def _name(gm: fx.GraphModule, index: int) -> str:
    return [node.name for node in gm.graph.nodes if node.op == "placeholder"][index]


def _is_written(node: fx.Node) -> bool:
    value = node.meta.get("example_value")  # made for this graph: what Dynamo ran on it has written into it, too
    return isinstance(value, Tensor) and not value.is_inference() and value._version > 0


def _returned_weight(gm: fx.GraphModule) -> str | None:
    """A result that no real input reaches would no more share the memory of the weights."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    reached = set(inputs) - {inputs[index] for index in weight_inputs(gm)}
    output = next(node for node in gm.graph.nodes if node.op == "output")
    for node in gm.graph.nodes:
        if reached & set(node.all_input_nodes):
            reached.add(node)
    constant = next((node for node in output.all_input_nodes if node not in reached), None)
    return f"its result {constant.name} is made of weights alone" if constant else None
