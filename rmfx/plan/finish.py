"""The last touches for a runtime that executes layer by layer: memory layout, and writing in place."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn

from rmfx.algebra.pointwise import NORMS
from rmfx.graph.facts import dtype_of, is_sum, module_of, shape_of
from rmfx.graph.linear import MIXING
from rmfx.modules import ChannelsLast


def lay_channels_last(gm: fx.GraphModule) -> None:
    """Let the network turn its images to channels-last itself; :func:`lay_weights` does that to the weights."""
    for node in [node for node in gm.graph.nodes if node.op == "placeholder"]:
        shape = shape_of(node)
        if shape is None or len(shape) != 4 or not node.users:
            continue
        name = f"channels_last_{node.name}"
        gm.add_submodule(name, ChannelsLast())
        with gm.graph.inserting_after(node):
            laid = gm.graph.call_module(name, (node,))
        laid.meta["shape"] = shape
        node.replace_all_uses_with(laid, lambda user, laid=laid: user is not laid)
    for node in gm.graph.nodes:
        if node.op == "call_method" and node.target == "view":
            node.target = "reshape"  # a view of other strides may not exist


def lay_weights(module: nn.Module) -> None:
    """Lay the weights of two-dimensional convolutions out with channels last, in place."""
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def write_in_place(gm: fx.GraphModule) -> None:
    """Let activations and sums write over their input, where that is a fresh tensor that nothing else reads.

    Not for a network that is to be trained on: what is overwritten may be needed for gradients.
    """
    for node in gm.graph.nodes:
        module = module_of(node)
        if is_sum(node):
            _add_in_place(node)
        elif module is not None and isinstance(getattr(module, "inplace", None), bool):
            module.inplace = _is_fresh(node.all_input_nodes[0])  # type: ignore[assignment]


def _add_in_place(node: fx.Node) -> None:
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return
    facts = shape_of(node), dtype_of(node)
    for target, other in ((first, second), (second, first)):
        alike = None not in facts and (shape_of(target), dtype_of(target)) == facts  # nothing broadcast or promoted
        if alike and _is_fresh(target):
            node.target, node.args = operator.iadd, (target, other)
            return


def _is_fresh(node: fx.Node) -> bool:
    """Whether the value of ``node`` has memory of its own, which only its one reader will see."""
    if len(node.users) != 1:
        return False
    return node.target in (operator.add, operator.iadd) or isinstance(module_of(node), (*MIXING, *NORMS))


def laid_out(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A module and its inputs in channels-last layout."""
    lay_weights(module)
    images = (x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)
    return module, tuple(images)
