"""Checks the normal form that every pass relies on; raises, never repairs. Linear, and cheap enough between passes."""

from __future__ import annotations

import operator

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from rmfx.errors import NormalFormError
from rmfx.front.aliasing import NO_OPS, is_plain_value
from rmfx.front.in_place import writes_by_name
from rmfx.front.opnames import is_eval_dropout, is_torch_function
from rmfx.front.tracer import location
from rmfx.modules import SizeGuard


def check_normal(gm: fx.GraphModule, keep_dropout: bool = False) -> None:
    """Check every rule of the normal form; with ``keep_dropout``, a dropout counts as doing something.

    1. All layers are in eval mode, without hooks and parametrizations.
    2. Each layer has one call site, under one name, and does something.
    3. ``operator.add`` is a sum and ``operator.mul`` a product of two tensors: two nodes, nothing else (sizes may
       be added up and multiplied too).
    4. Nothing works in place.
    5. The graph is well-formed, no node is dead, no layer, parameter or buffer is unused, every name resolves.

    Raises:
        NormalFormError: names the first broken rule and its node.
    """
    _check_graph(gm)
    tensors: set[fx.Node] = set()
    owners: dict[int, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            _check_layer(gm, node, owners, nn.Identity if keep_dropout else NO_OPS)
        elif node.op in ("call_function", "call_method"):
            _check_operation(node, tensors)
        _check_alive(node)
        if not is_plain_value(node, tensors):
            tensors.add(node)
    _check_tree(gm)


def _fail(rule: int, node: fx.Node, what: str) -> NormalFormError:
    return NormalFormError(f"rule {rule} of the normal form: {node.name} ({location(node)}) {what}")


def _check_graph(gm: fx.GraphModule) -> None:
    try:
        gm.graph.lint()
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise NormalFormError(f"rule 5 of the normal form: the graph is not well-formed: {reason}") from error
    if not any(node.op == "output" for node in reversed(gm.graph.nodes)):
        raise NormalFormError("rule 5 of the normal form: the graph has no output")


def _check_layer(
    gm: fx.GraphModule, node: fx.Node, owners: dict[int, fx.Node], idle: type[nn.Module] | tuple[type[nn.Module], ...]
) -> None:
    module = gm.get_submodule(str(node.target))
    first = owners.setdefault(id(module), node)
    if first is not node:
        raise _fail(2, node, f"calls the layer {node.target}, which {first.name} calls already")
    if isinstance(module, idle):
        raise _fail(2, node, f"calls {node.target}, a {type(module).__name__} that does nothing in eval mode")
    if getattr(module, "inplace", False):
        raise _fail(4, node, f"calls {node.target}, which works in place")
    for part in module.modules():
        if part.training:
            raise _fail(1, node, f"calls {node.target}, which is in training mode")
        if part._forward_hooks or part._forward_pre_hooks:
            raise _fail(1, node, f"calls {node.target}, which has a forward hook")
        if parametrize.is_parametrized(part):
            raise _fail(1, node, f"calls {node.target}, which is parametrized")


def _check_operation(node: fx.Node, tensors: set[fx.Node]) -> None:
    if writes_by_name(node):
        raise _fail(4, node, f"works in place: {getattr(node.target, '__name__', node.target)}")
    if is_eval_dropout(node):
        raise _fail(2, node, "is a dropout that does nothing in eval mode")
    if node.target not in (operator.add, operator.mul) or not any(source in tensors for source in node.all_input_nodes):
        return
    if node.kwargs or len(node.args) != 2 or not all(arg in tensors for arg in node.args):
        raise _fail(3, node, f"is an operator.{node.target.__name__}, but not of exactly two tensors")


def _check_alive(node: fx.Node) -> None:
    if node.users or node.op in ("placeholder", "output"):
        return
    if node.op == "call_function" and not is_torch_function(node.target):
        return  # a function of the user may be called for its effect
    if node.op == "call_module" and isinstance(node.graph.owning_module.get_submodule(str(node.target)), SizeGuard):  # type: ignore[union-attr]
        return
    raise _fail(5, node, "is dead: nothing reads it")


def _check_tree(gm: fx.GraphModule) -> None:
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    pending: list[tuple[str, nn.Module]] = [("", gm)]
    while pending:
        prefix, owner = pending.pop()
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if isinstance(tensor, Tensor) and prefix + name not in read:
                raise NormalFormError(f"rule 5 of the normal form: nothing reads the tensor {prefix}{name}")
        for name, child in owner._modules.items():
            path = prefix + name
            if path in called or child is None:
                continue
            if not any(True for _ in (*child.children(), *child.parameters(False), *child.buffers(False))):
                raise NormalFormError(f"rule 5 of the normal form: nothing calls the layer {path}")
            pending.append((f"{path}.", child))
