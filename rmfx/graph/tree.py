"""Keeps the module tree of a graph down to what the graph names."""

from __future__ import annotations

from torch import fx, nn


def drop_unused(gm: fx.GraphModule) -> None:
    """Remove layers, parameters and buffers that no node names; linear, unlike fx's own clean-up."""
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    _prune(gm, "", called, read)


def _prune(owner: nn.Module, prefix: str, called: set[str], read: set[str]) -> bool:
    """Remove from ``owner`` what no node names; returns whether anything is left."""
    for table in (owner._parameters, owner._buffers):
        for name in [name for name in table if prefix + name not in read]:
            del table[name]
    for name, child in list(owner._modules.items()):
        path = prefix + name
        if path not in called and (child is None or not _prune(child, f"{path}.", called, read)):
            del owner._modules[name]
        elif child is not None:
            child.training = False
    return bool(owner._parameters or owner._buffers or owner._modules)
