"""The shape and dtype of every value of a traced graph, for example inputs; runs nothing for real."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

_KEYS = ("shape", "dtype")


def find_shapes(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> bool:
    """Fill ``meta["shape"]`` and ``meta["dtype"]`` of every tensor; in a network that cannot be run, of none.

    Args:
        gm: any graph, also one that works in place: nothing is written.
        inputs: in the order of the placeholders.

    Returns:
        Whether the network can be run on these inputs.

    >>> gm = fx.symbolic_trace(torch.nn.Linear(2, 3))
    >>> find_shapes(gm, (torch.ones(5, 2),)), [tuple(node.meta["shape"]) for node in gm.graph.nodes][:2]
    (True, [(5, 2), (3, 2)])
    """
    runs = True
    try:
        with torch.no_grad():
            FakeTensorProp(gm, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, IndexError):
        runs = False  # whoever needs shapes runs the network again, and tells what went wrong
    for node in gm.graph.nodes:
        value = node.meta.pop("val", None)
        if runs and isinstance(value, torch.Tensor):
            node.meta["shape"], node.meta["dtype"] = value.shape, value.dtype
    return runs


def forget_dtypes(gm: fx.GraphModule) -> None:
    """Drop what only the normalisation needs."""
    for node in gm.graph.nodes:
        node.meta.pop("dtype", None)
