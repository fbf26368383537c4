"""The certificate of plainness: a network whose every tensor has one reader is an ``nn.Sequential``."""

from __future__ import annotations

from torch import fx, nn

from rmfx.check.counting import Join, count_joins, count_onnx_joins
from rmfx.errors import NotPlainError
from rmfx.modules import ChannelClamp, MaskedActivation

__all__ = ["Join", "count_joins", "count_onnx_joins", "to_sequential"]

_STRICT = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Flatten),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.ReLU, nn.PReLU, nn.ReLU6, nn.Hardtanh, ChannelClamp),
)


def to_sequential(converted: fx.GraphModule, strict: bool = False) -> nn.Sequential:
    """The layers of ``converted`` in order, if it is a plain chain: no tensor has two readers.

    The layers are the module objects of ``converted`` itself, not copies: memory is not doubled, and a change of
    weights in one shows in the other.

    Args:
        converted: a network in normal form, usually from ``rmfx.convert``.
        strict: admit only convolutions, linear layers, pools, flatten, ReLU, PReLU and clamps (ReLU6, Hardtanh,
            :class:`rmfx.modules.ChannelClamp`).

    Raises:
        NotPlainError: naming the first tensor with two readers, the first node that is no layer, or with ``strict`` the
            first layer of another type.

    >>> to_sequential(fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    Sequential(
      (0): Linear(in_features=2, out_features=2, bias=True)
      (1): ReLU()
    )
    """
    if not isinstance(converted, fx.GraphModule):
        raise NotPlainError(f"to_sequential takes a torch.fx.GraphModule, got {type(converted).__name__}")
    node = _only_input(converted.graph)
    layers: list[nn.Module] = []
    while (reader := _only_reader(node)).op != "output":
        layer = _layer(converted, reader, node)
        if strict:
            _demand_strict(layer, reader)
        layers.append(layer)
        node = reader
    if reader.args != (node,):
        raise NotPlainError(
            f"the network returns {type(reader.args[0]).__name__.removeprefix('immutable_')}, not one tensor"
        )
    sequential = nn.Sequential(*layers)
    sequential.training = converted.training  # train() would reach into the shared layers
    return sequential


def _only_input(graph: fx.Graph) -> fx.Node:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        names = ", ".join(node.name for node in inputs) or "none"
        raise NotPlainError(f"a chain has one input, this network has {len(inputs)}: {names}")
    return inputs[0]


def _only_reader(node: fx.Node) -> fx.Node:
    """The one node that reads ``node``'s value, once."""
    readers = [user for user in node.users for argument in _arguments(user) if argument is node]
    if len(readers) == 1:
        return readers[0]
    if not readers:
        raise NotPlainError(f"tensor {_named(node)} has no reader: the network does not end in one output")
    raise NotPlainError(
        f"tensor {_named(node)} has {len(readers)} readers: {', '.join(_named(reader) for reader in readers)}"
    )


def _layer(converted: fx.GraphModule, node: fx.Node, source: fx.Node) -> nn.Module:
    """``node`` as a layer of one input, ``source``."""
    if node.op == "call_module" and node.args == (source,) and not node.kwargs:
        layer = converted.get_submodule(str(node.target))
        if getattr(layer, "return_indices", False):
            raise NotPlainError(f"layer {_named(node)} returns indices beside its tensor")
        return layer
    flatten = _flatten(node, source)
    if flatten is not None:
        return flatten
    raise NotPlainError(f"node {_named(node)} is no layer of one tensor: {node.op} {_called(node)}")


def _flatten(node: fx.Node, source: fx.Node) -> nn.Flatten | None:
    """``torch.flatten(x, start, end)`` as a module."""
    is_flatten = _called(node).endswith("flatten") and node.op in ("call_function", "call_method")
    if not is_flatten or not node.args or node.args[0] is not source:
        return None
    given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | dict(node.kwargs)
    start, end = given.pop("start_dim", 0), given.pop("end_dim", -1)
    return nn.Flatten(start, end) if not given and isinstance(start, int) and isinstance(end, int) else None


def _demand_strict(layer: nn.Module, node: fx.Node) -> None:
    if type(layer) in _STRICT:
        return
    if isinstance(layer, MaskedActivation):
        raise NotPlainError(
            f"layer {_named(node)} is the masked carrier of {type(layer.activation).__name__} (MaskedActivation), "
            "which strict does not admit"
        )
    raise NotPlainError(f"layer {_named(node)} is a {type(layer).__name__}, which strict does not admit")


def _arguments(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _called(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _named(node: fx.Node) -> str:
    """A node for messages: a layer by its qualified name, anything else by its own name and place."""
    if node.op == "call_module":
        return repr(str(node.target))
    place = node.meta.get("place")
    return f"{node.name!r} (in {place})" if place else repr(node.name)
