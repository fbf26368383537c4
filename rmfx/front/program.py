"""Opens what ``torch.export`` gives: a graph whose weights are attributes under their names, with plain inputs.

An ``ExportedProgram`` takes weights as inputs, flattens nested arguments, and hides blocks under ``torch.no_grad`` in
sub-graphs. Here weights are read from a bare module tree that shares them, each argument of ``forward`` is one
placeholder, outputs have the structure they had, and there are no sub-graphs. The operations stay what they were.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from rmfx.errors import TraceError
from rmfx.front.tracer import Line, is_user_file

_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_EMPTY = inspect.Parameter.empty
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_CALL_COUNT = re.compile(r"@\d+$")
# Dynamo spells a path as the expression that reads it.
_SUBSCRIPT = re.compile(r"(?:\._modules|\._parameters|\._buffers)?\[['\"]?([^'\"\]]+)['\"]?\]")
_DICT = re.compile(r"\.__dict__\[['\"](_modules|_parameters|_buffers)['\"]\]")  # in code that writes attributes
_MODEL = re.compile(r"^L\[['\"]\w+['\"]\]")


def open_program(program: ExportedProgram) -> fx.GraphModule:
    """The graph of ``program`` over a bare module tree that shares its weights, with the signature of the model.

    Each node has ``meta["place"]``, ``meta["line"]``, ``meta["leaf"]`` (the qualified name of the layer of ``torch.nn``
    whose ``forward`` made it, where there is one) and ``meta["val"]`` as the program knows it.

    Raises:
        TraceError: when the program takes or returns something that is no tensor, or changes what it holds.

    >>> import torch
    >>> program = torch.export.export(nn.Linear(2, 2).eval(), (torch.zeros(1, 2),))
    >>> [node.name for node in open_program(program).graph.nodes]
    ['input_1', 'weight', 'bias', 'linear', 'output']
    """
    signature = program.graph_signature
    for out in signature.output_specs:
        if out.kind is not OutputKind.USER_OUTPUT:
            raise TraceError(f"the exported program changes {out.target or out.arg.name} on every call")
    root, graph = nn.Module(), fx.Graph()
    root.training = False
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values: dict[fx.Node, Any] = {}
    inputs = [spec.arg for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
    for argument in inputs:
        if not isinstance(argument, TensorArgument):
            raise TraceError(f"the input {argument.name!r} is no tensor, and torch.export makes it a constant")
    args, kwargs = pytree.tree_unflatten([placeholders[a.name] for a in inputs], program.call_spec.in_spec)
    call = program.module_call_graph[0].signature
    _open_inputs(args, kwargs, getattr(call, "forward_arg_names", None) or [], graph, values)
    for spec in signature.input_specs:
        if spec.kind in _STATE:
            node, name = placeholders[spec.arg.name], str(spec.target)
            hold(root, name, _state(program, name))
            if node.users:
                values[node] = graph.get_attr(name)
                values[node].meta.update(place=name.rpartition(".")[0], line=None, val=node.meta.get("val"))
        elif spec.kind is not InputKind.USER_INPUT:
            raise TraceError(f"the exported program needs {spec.arg.name}, a {spec.kind.name.lower()}")
    _copy_nodes(program.graph_module, graph, values)
    (flat,) = next(node for node in program.graph.nodes if node.op == "output").args
    leaves = map_arg(list(flat), values.__getitem__)
    out_spec = program.call_spec.out_spec
    graph.output(pytree.tree_unflatten(leaves, out_spec) if out_spec is not None else tuple(leaves))
    return fx.GraphModule(root, graph, "Exported")


def open_module(gm: fx.GraphModule) -> fx.GraphModule:
    """The same for a module that torch made of a program, such as ``program.module()``, or that Dynamo made.

    Args:
        gm: a graph over its own modules and tensors, which are shared. Its hidden signature becomes a plain one.
    """
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    tree = gm.graph._codegen.pytree_info if isinstance(gm.graph._codegen, _PyTreeCodeGen) else None
    if tree is None:
        for node in inputs:
            values[node] = graph.placeholder(str(node.target), default_value=node.args[0] if node.args else _EMPTY)
            describe(values[node], node)
    else:
        args, kwargs = pytree.tree_unflatten(inputs, tree.in_spec)
        _open_inputs(args, kwargs, [name for name in tree.orig_args if name != "self"], graph, values)
    _copy_nodes(gm, graph, values)
    (returned,) = next(node for node in gm.graph.nodes if node.op == "output").args
    result = map_arg(returned, values.__getitem__)
    if tree is not None and tree.out_spec is not None:
        result = pytree.tree_unflatten(list(result), tree.out_spec)
    graph.output(result)
    return fx.GraphModule(gm, graph, "Exported")


def _state(program: ExportedProgram, name: str) -> Tensor:
    value = program.state_dict.get(name, program.constants.get(name))
    if not isinstance(value, Tensor):
        raise TraceError(f"the exported program holds no value of {name}")
    return value


def hold(root: nn.Module, name: str, value: Tensor) -> None:
    """Register ``value`` in ``root`` under its qualified name, in bare modules."""
    owner = root
    *path, last = name.split(".")
    for part in path:
        if part not in owner._modules:
            bare = nn.Module()
            bare.training = False
            owner.add_module(part, bare)
        owner = owner.get_submodule(part)
    if isinstance(value, nn.Parameter):
        owner.register_parameter(last, value)
    else:
        owner.register_buffer(last, value)


# -- inputs -----------------------------------------------------------------------------------------------------------


def _open_inputs(
    args: Sequence[Any], kwargs: dict[str, Any], known: Sequence[str], graph: fx.Graph, values: dict[fx.Node, Any]
) -> None:
    """One placeholder for each argument of ``forward``, whose tensors are read from it.

    Args:
        args, kwargs: the arguments, nested as they are, with a node of the old graph for each tensor.
        known: what ``forward`` calls its positional arguments, as far as the program knows it.
        graph, values: get the new nodes.
    """
    names = list(known[: len(args)])
    for index in range(len(names), len(args)):
        names.append(str(args[index].target) if isinstance(args[index], fx.Node) else f"args_{index}")
    for name, value in zip([*names, *kwargs], (*args, *kwargs.values()), strict=True):
        whole = graph.placeholder(name)
        whole.meta.update(place="", line=None)
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            part = whole
            for key in path:
                part = _read(graph, part, key)
            part.meta["val"] = leaf.meta.get("val")
            values[leaf] = part


def _read(graph: fx.Graph, whole: fx.Node, key: Any) -> fx.Node:
    if isinstance(key, pytree.SequenceKey):
        part = graph.call_function(operator.getitem, (whole, key.idx))
    elif isinstance(key, pytree.MappingKey):
        part = graph.call_function(operator.getitem, (whole, key.key))
    else:
        part = graph.call_function(getattr, (whole, key.name))
    part.meta.update(place="", line=None)
    return part


# -- nodes ------------------------------------------------------------------------------------------------------------


def _copy_nodes(gm: fx.GraphModule, graph: fx.Graph, values: dict[fx.Node, Any]) -> None:
    """Copy all operations of ``gm`` into ``graph``; blocks that only switch gradients or autocast off are opened."""
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output") or _is_check(node):
            continue
        if node.op == "get_attr" and isinstance(getattr(gm, str(node.target), None), fx.GraphModule):
            continue  # a block, opened where it is called
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda old: values.get(old, old))
        if (block := _block(gm, node)) is not None:
            inner, given = block
            entry = [old for old in inner.graph.nodes if old.op == "placeholder"]
            values.update(zip(entry, map_arg(given, values.__getitem__), strict=True))
            _copy_nodes(inner, graph, values)
            (made,) = next(old for old in inner.graph.nodes if old.op == "output").args
            values[node] = map_arg(made, values.__getitem__)
        elif node.target is operator.getitem and isinstance(args[0], tuple | list):
            values[node] = args[0][args[1]]
        else:
            copied = graph.create_node(node.op, node.target, args, kwargs, node.name)
            describe(copied, node)
            values[node] = copied


def _is_check(node: fx.Node) -> bool:
    """Whether the node only checks kinds and sizes: the program runs on other floats, too."""
    name = str(getattr(node.target, "__name__", node.target))
    checks = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "_check", "_guards_fn")
    return not node.users and name.startswith(checks)


def _block(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.GraphModule, tuple[Any, ...]] | None:
    name = getattr(node.target, "__name__", "")
    if name == "wrap_with_set_grad_enabled":
        _, inner, *given = node.args
    elif name == "wrap_with_autocast":
        _, _, enabled, _, inner, *given = node.args
        if enabled:
            raise TraceError("a block under torch.autocast computes in another type than its weights have")
    else:
        return None
    assert isinstance(inner, fx.Node)
    return getattr(gm, str(inner.target)), tuple(given)


def describe(new: fx.Node, old: fx.Node) -> None:
    """Give ``new`` the place, line, layer and known value of ``old``, a node that torch made."""
    new.meta["val"] = old.meta.get("val", old.meta.get("example_value"))
    place, leaf = where(old)
    new.meta["place"], new.meta["leaf"] = old.meta.get("place", place), old.meta.get("leaf", leaf)
    new.meta["line"] = old.meta.get("line", _line(old))


def where(node: fx.Node) -> tuple[str, str | None]:
    """The module whose ``forward`` made ``node``, and the layer of ``torch.nn`` that it is, where it is one.

    >>> graph = fx.Graph()
    >>> node = graph.placeholder("x")
    >>> node.meta["nn_module_stack"] = {"": ("", "net.Net"), "conv": ("conv@1", "torch.nn.modules.conv.Conv2d")}
    >>> where(node)
    ('', 'conv')
    """
    before = ""
    for path, kind in node.meta.get("nn_module_stack", {}).values():
        name = _CALL_COUNT.sub("", plain_path(path))
        home = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        if home.startswith("torch.nn.modules.") and not home.startswith("torch.nn.modules.container."):
            return before, name
        before = name
    return before, None


def short_path(path: str) -> str:
    """Dynamo's expression for a module or tensor as it is where the code writes no attributes of its model.

    >>> short_path("L['self'].__dict__['_modules']['conv']._parameters['weight']")
    "L['self']._modules['conv']._parameters['weight']"
    """
    return _DICT.sub(r".\1", path)


def plain_path(path: str) -> str:
    """The qualified name that Dynamo's expression for a module or tensor stands for.

    >>> plain_path("L['self']._modules['layers']._modules['0']._parameters['weight']")
    'layers.0.weight'
    """
    path = short_path(path)
    return _SUBSCRIPT.sub(r".\1", _MODEL.sub("", path)).lstrip(".") if _MODEL.match(path) else path


def _line(node: fx.Node) -> Line | None:
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    return next(((file, int(line)) for file, line in reversed(frames) if is_user_file(file)), None)
