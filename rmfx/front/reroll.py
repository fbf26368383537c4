"""Puts layers back under the names that they had: an exported graph calls functions on their weights.

A call that stands for one layer of ``torch.nn`` (:func:`rmfx.front.spelling.spell`) and that one layer of the model
made, reading that layer's weights and no one else's, becomes the call of a layer of that name. All other calls are left
to normalisation, which names layers after their place.
"""

from __future__ import annotations

from torch import Tensor, fx, nn

from rmfx.front.kinds import Kind
from rmfx.front.spelling import spell


def reroll(gm: fx.GraphModule) -> None:
    """Replace calls by layers, in place.

    Args:
        gm: an exported graph: nodes have ``meta["leaf"]`` and ``meta["val"]`` where known. Nothing in it is in place.
    """
    readers: dict[str, set[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target).rpartition(".")[0], set()).update(node.users)
    for node in list(gm.graph.nodes):
        path = node.meta.get("leaf")
        if not path or node.op not in ("call_function", "call_method") or not _is_free(gm, path, node, readers):
            continue
        spelled = spell(node, _kind, lambda source: _constant(gm, source))
        if spelled is None:
            continue
        for part in spelled.layer.modules():
            part.training = False
        _put(gm, path, spelled.layer)
        old = [source for source in node.all_input_nodes if source is not spelled.source]
        node.op, node.target, node.args, node.kwargs = "call_module", path, (spelled.source,), {}
        node._rename(path.replace(".", "_"))  # what tracing would call it
        for source in old:
            if source.op == "get_attr" and not source.users:
                gm.graph.erase_node(source)


def _is_free(gm: fx.GraphModule, path: str, node: fx.Node, readers: dict[str, set[fx.Node]]) -> bool:
    """Whether ``path`` holds the weights that ``node`` reads, for no other node, or nothing at all."""
    reads = {str(source.target).rpartition(".")[0] for source in node.all_input_nodes if source.op == "get_attr"}
    owner: nn.Module | None = gm
    for part in path.split("."):
        if owner is not gm and type(owner) is not nn.Module:
            return False  # inside of a layer
        owner = owner._modules.get(part) if owner is not None else None
        if owner is None:
            return not reads
    if type(owner) is not nn.Module or owner._modules:
        return False
    return reads == {path} and readers[path] == {node}


def _put(gm: fx.GraphModule, path: str, layer: nn.Module) -> None:
    owner: nn.Module = gm
    *before, last = path.split(".")
    for part in before:
        if part not in owner._modules:
            bare = nn.Module()
            bare.training = False
            owner.add_module(part, bare)
        owner = owner.get_submodule(part)
    owner._modules[last] = layer


def _kind(node: fx.Node) -> Kind:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return Kind()
    return Kind(True, value.dim(), value.is_floating_point())


def _constant(gm: fx.GraphModule, node: fx.Node) -> Tensor | None:
    if node.op != "get_attr":
        return None
    value: object = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value if isinstance(value, Tensor) else None
