"""Keeps the module tree of a graph down to what the graph names."""

from __future__ import annotations

from torch import fx, nn


def drop_unused(gm: fx.GraphModule) -> None:
    """Remove layers, parameters and buffers that no node names; linear, unlike fx's own clean-up.

    What is removed is left as it was: other graphs may share it.
    """
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    named = (name.split(".") for name in called | read)
    owners = {".".join(parts[:end]) for parts in named for end in range(1, len(parts))}
    _prune(gm, "", called, read, owners)


def _prune(owner: nn.Module, prefix: str, called: set[str], read: set[str], owners: set[str]) -> None:
    for table in (owner._parameters, owner._buffers):
        for name in [name for name in table if prefix + name not in read]:
            del table[name]
    for name, child in list(owner._modules.items()):
        path = prefix + name
        if child is None or (path not in called and path not in owners):
            del owner._modules[name]
            continue
        child.training = False
        if path not in called:
            _prune(child, f"{path}.", called, read, owners)
