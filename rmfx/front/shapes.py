"""The shape and dtype of every value of a traced graph, for example inputs; runs nothing for real."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from rmfx.quiet import quiet_fakes

_NORMS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}  # and the ranks that they take


def propagate(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """Fill ``meta["shape"]`` and ``meta["dtype"]`` of every tensor; raises whatever the network raises on ``inputs``.

    >>> gm = fx.symbolic_trace(torch.nn.Linear(2, 3))
    >>> propagate(gm, (torch.ones(5, 2),))
    >>> [tuple(node.meta["shape"]) for node in gm.graph.nodes][:2]
    [(5, 2), (3, 2)]
    """
    with torch.no_grad(), quiet_fakes():
        _Shapes(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)
    for node in gm.graph.nodes:
        value = node.meta.pop("val", None)
        if isinstance(value, Tensor):
            node.meta["shape"], node.meta["dtype"] = value.shape, value.dtype


class _Shapes(FakeTensorProp):
    """Calls no batch norm that keeps shape and type: torch works one out in a dozen operations on fake tensors."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if len(args) == 1 and not kwargs and _keeps(module, args[0]):
            return torch.empty_like(args[0])
        return super().call_module(target, args, kwargs)


def _keeps(module: nn.Module, x: Any) -> bool:
    """Whether ``module`` is a norm in eval mode that surely takes ``x``."""
    ranks = _NORMS.get(type(module))  # type: ignore[arg-type]
    if ranks is None or module.training or module._forward_hooks or module._forward_pre_hooks:
        return False
    mean = module.running_mean
    fits = isinstance(x, Tensor) and x.dim() in ranks and x.shape[1] == module.num_features
    return fits and isinstance(mean, Tensor) and x.dtype == mean.dtype and x.device == mean.device


def find_shapes(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> bool:
    """Fill ``meta["shape"]`` and ``meta["dtype"]`` of every tensor; in a network that cannot be run, of none.

    Args:
        gm: any graph, also one that works in place: nothing is written.
        inputs: in the order of the placeholders.

    Returns:
        Whether the network can be run on these inputs.

    >>> gm = fx.symbolic_trace(torch.nn.Linear(2, 3))
    >>> find_shapes(gm, (torch.ones(5, 2),)), find_shapes(gm, (torch.ones(5, 3),))
    (True, False)
    """
    try:
        propagate(gm, inputs)
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, IndexError):
        for node in gm.graph.nodes:
            node.meta.pop("val", None)
        return False  # whoever needs shapes runs the network again, and tells what went wrong
    return True


def infer_shape(gm: fx.GraphModule, node: fx.Node) -> None:
    """Fill ``meta["shape"]`` and ``meta["dtype"]`` of a new node, where those of its operands are known.

    >>> gm = fx.symbolic_trace(torch.nn.Sequential(torch.nn.Flatten()))
    >>> propagate(gm, (torch.ones(2, 3, 4),))
    >>> x, flat, _ = gm.graph.nodes
    >>> del flat.meta["shape"]
    >>> infer_shape(gm, flat)
    >>> flat.meta["shape"]
    torch.Size([2, 12])
    """
    if not all({"shape", "dtype"} <= source.meta.keys() for source in node.all_input_nodes):
        return
    args = fx.map_arg(node.args, lambda source: _on_meta(source.meta["shape"], source.meta["dtype"]))
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        weights = {name: _on_meta(value.shape, value.dtype) for name, value in module.state_dict().items()}
        result = torch.func.functional_call(module, weights, args)
    else:
        result = node.target(*args)  # type: ignore[operator]
    node.meta["shape"], node.meta["dtype"] = result.shape, result.dtype


def _on_meta(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def forget_dtypes(gm: fx.GraphModule) -> None:
    """Drop what only the normalisation needs."""
    for node in gm.graph.nodes:
        node.meta.pop("dtype", None)
