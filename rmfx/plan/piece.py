"""A part of a network as a network of its own: what prices are computed for and measured on."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from rmfx.graph.facts import is_plain, module_of, shape_of
from rmfx.graph.padding import split_padding


def cut_out(scope: Sequence[fx.Node]) -> fx.GraphModule:
    """The nodes of ``scope``, in graph order, as a graph over the same layers.

    What they read from elsewhere becomes its inputs, what is read elsewhere its outputs; names, facts and maps of
    nodes are kept, so that passes run on it as they do on the whole.
    """
    gm = scope[0].graph.owning_module
    assert gm is not None
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    inside = set(scope)
    for source in dict.fromkeys(source for node in scope for source in node.all_input_nodes if source not in inside):
        values[source] = graph.placeholder(source.name)
        values[source].meta = dict(source.meta)
    for node in scope:
        values[node] = graph.node_copy(node, values.__getitem__)
        values[node].meta = dict(node.meta)
        values[node].meta.setdefault("origin", node.name)
    read = [values[node] for node in scope if any(user not in inside for user in node.users)]
    graph.output(read[0] if len(read) == 1 else tuple(read))
    return fx.GraphModule(gm, graph)


def outputs_of(piece: fx.GraphModule) -> list[fx.Node]:
    """The nodes whose values a piece returns."""
    return next(node for node in piece.graph.nodes if node.op == "output").all_input_nodes


def inputs_of(piece: fx.GraphModule) -> tuple[Tensor, ...] | None:
    """Random inputs of the shapes that the nodes know, or ``None`` where one of them is no tensor of known shape."""
    made: list[Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for node in piece.graph.nodes:
        if node.op != "placeholder":
            continue
        shape = shape_of(node)
        if shape is None or is_plain(node):
            return None
        made.append(torch.randn(shape, generator=generator))
    return tuple(made)


def signature(piece: fx.GraphModule) -> str:
    """What the speed of a piece depends on, as text: its operations, their shapes, and how they are connected."""
    numbers = {node: index for index, node in enumerate(piece.graph.nodes)}
    lines = []
    for node in piece.graph.nodes:
        module = module_of(node)
        named = node.op if module is None and node.op != "call_function" else str(module or node.target)
        shape = shape_of(node)
        reads = ",".join(str(numbers[source]) for source in node.all_input_nodes)
        constants = "" if module is not None else repr([a for a in node.args if not isinstance(a, fx.Node)])
        lines.append(f"{named}({reads}){constants}->{tuple(shape) if shape is not None else '?'}")
    return "\n".join(lines)


def runnable(piece: fx.GraphModule) -> fx.GraphModule:
    """A copy that computes, in float32: layers whose weights are not computed yet get random ones.

    Times do not depend on the values, as long as none is so small that the hardware treats it apart.
    """
    made = copy.deepcopy(piece)
    split_padding(made)
    generator = torch.Generator().manual_seed(0)
    for module in made.modules():
        if any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
            module.to_empty(device="cpu", recurse=False)
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data.normal_(0, 0.05, generator=generator)
    return made.float().eval()
