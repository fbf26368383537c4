"""Count what joins two data tensors: the proof that residual connections are gone.

A *data tensor* is one whose values depend on the network's input; parameters, constants and numbers read off shapes are
not. A *join* is an operation that reads two of them. Counted on two independent accounts of a network: the functional
graph of ``torch.export``, where every spelling of a sum is one operation, and an ONNX file as it was written.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx
import onnx.inliner
import torch
from torch import Tensor, fx, nn

from rmfx.algebra.pointwise import POINTWISE
from rmfx.errors import ExportError, FileFormatError
from rmfx.quiet import quiet

Kind = Literal["sum", "concat", "stack", "where", "maximum", "slice", "gate", "other"]

_TORCH_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("add", "sub", "rsub", "lerp", "addcmul", "addcdiv"), "sum"),
    **dict.fromkeys(("maximum", "minimum", "max", "min", "fmax", "fmin"), "maximum"),
    **dict.fromkeys(
        ("slice_scatter", "select_scatter", "index_put", "scatter", "masked_scatter", "index_copy"), "slice"
    ),
    **dict.fromkeys(("mul", "div", "pow", "matmul", "mm", "bmm", "einsum", "linear", "prelu"), "gate"),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "scaled_dot_product_attention"), "gate"),
    "cat": "concat",
    "stack": "stack",
    "where": "where",
}
_ONNX_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("Add", "Sub", "Sum", "Mean"), "sum"),
    **dict.fromkeys(("Max", "Min"), "maximum"),
    **dict.fromkeys(("ScatterND", "ScatterElements", "Scatter"), "slice"),
    **dict.fromkeys(("Mul", "Div", "Pow", "MatMul", "Gemm", "Einsum", "Conv", "PRelu", "Attention"), "gate"),
    **dict.fromkeys(("Concat", "SequenceConstruct"), "concat"),
    "Where": "where",
}
# Their outputs have the shape of the input and none of its values.
_SHAPE_ONLY = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
_SHAPE_ONLY_ONNX = {"Shape", "Size", "EyeLike"}
# Inputs whose values reach the output, where not all do: the condition of Where chooses, CastLike only reads a dtype.
_VALUES_ONNX = {"Where": slice(1, 3), "CastLike": slice(0, 1)}
# One pointwise layer is one step, also where it is written as several operations: a masked activation, x * sigmoid(x).
_ONE_STEP = {f"{layer.__module__}.{layer.__qualname__}" for layer in POINTWISE}
_HIERARCHY = "pkg.torch.onnx.class_hierarchy"
_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class Join:
    """One operation that reads two or more data tensors.

    ``kind`` is "sum" (also of scaled and subtracted tensors), "concat", "stack", "where", "maximum" (or minimum),
    "slice" (a part of one tensor is overwritten by another), "gate" (a product), or "other".
    """

    kind: Kind
    name: str  # of the operation, in the graph it was counted on
    place: str  # qualified name of the module that holds it, "" for the root
    operands: tuple[str, ...]  # the modules, or else operations, that made the data tensors


def count_joins(network: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> tuple[Join, ...]:
    """Every join on the functional graph that ``torch.export`` gives of ``network``.

    Operations inside one pointwise layer (:data:`rmfx.algebra.pointwise.POINTWISE`, such as
    :class:`rmfx.modules.MaskedActivation`) are one step and not counted. Gates are a kind of their own, since the side
    path of a gate may stay.

    Raises:
        ExportError: when ``torch.export`` cannot follow the network.

    >>> count_joins(nn.Sequential(nn.Linear(2, 2), nn.SiLU()).eval(), torch.ones(1, 2))
    ()
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    try:
        with quiet():
            program = torch.export.export(network, inputs, strict=False).run_decompositions({})
    except Exception as problem:  # torch.export runs the user's code, which may raise anything
        raise ExportError(f"torch.export cannot follow this network: {problem}") from problem
    data = {node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs}
    found: list[Join] = []
    for node in program.graph.nodes:
        operands = [value for value in _operands(node) if value in data]
        if node.op != "call_function" or not operands or _base_name(node) in _SHAPE_ONLY or not _is_tensor(node):
            continue
        data.add(node)
        if len(operands) > 1 and _ONE_STEP.isdisjoint(_classes(node)):
            kind = _TORCH_KINDS.get(_base_name(node), "other")
            found.append(Join(kind, node.name, _place(node), tuple(_place(value) or value.name for value in operands)))
    return tuple(found)


def count_onnx_joins(path: str | os.PathLike[str]) -> tuple[Join, ...]:
    """Every join in an ONNX file, counted as in :func:`count_joins`; external tensor data is not read.

    Pointwise layers are known by the metadata that ``torch.onnx`` writes; in a file without it their operations count.

    Raises:
        FileFormatError: when ``path`` is no ONNX file.
    """
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
    except Exception as problem:  # OSError, or one of protobuf's own
        raise FileFormatError(f"cannot read {path} as ONNX: {problem}") from problem
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    constants = {tensor.name for tensor in model.graph.initializer}
    makers = {entry.name: entry.name for entry in model.graph.input if entry.name not in constants}
    return tuple(_scan(model.graph, makers))


def _operands(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values ``node`` reads, one by one: ``x + x`` reads two."""
    if _base_name(node) == "where":
        return [value for value in node.args[1:3] if isinstance(value, fx.Node)]  # the condition only chooses
    if _base_name(node) == "copy":
        return [value for value in node.args[1:2] if isinstance(value, fx.Node)]  # overwrites its first argument
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _base_name(node: fx.Node) -> str:
    return node.target._schema.name.split("::")[-1] if isinstance(node.target, torch._ops.OpOverload) else ""


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value)
    )


def _classes(node: fx.Node) -> list[str]:
    return [str(entry[1]) for entry in node.meta.get("nn_module_stack", {}).values()]


def _place(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def _scan(graph: onnx.GraphProto, makers: dict[str, str]) -> Iterator[Join]:
    """Joins of ``graph``; ``makers`` maps each data tensor to what made it, and grows."""
    for node in graph.node:
        inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        for branch in inner:
            yield from _scan(branch, makers)
        names = node.input[_VALUES_ONNX.get(node.op_type, slice(None))]
        operands = [makers[name] for name in names if name in makers]
        inner_data = any(output.name in makers for branch in inner for output in branch.output)
        if node.op_type in _SHAPE_ONLY_ONNX or not (operands or inner_data):
            continue
        classes, place = _onnx_list(node, _HIERARCHY), _onnx_place(node)
        label = place or node.name or node.output[0]
        makers.update(dict.fromkeys(node.output, label))
        if len(operands) > 1 and not inner and _ONE_STEP.isdisjoint(classes):
            kind = "stack" if "aten.stack.default" in classes else _ONNX_KINDS.get(node.op_type, "other")
            yield Join(kind, node.name or node.output[0], place, tuple(operands))


def _onnx_list(node: onnx.NodeProto, key: str) -> list[str]:
    """A list of strings that ``torch.onnx`` left in the node's metadata; empty in files of other origin."""
    texts = [entry.value for entry in node.metadata_props if entry.key == key]
    try:
        value: Any = ast.literal_eval(texts[0]) if texts else []
    except (ValueError, SyntaxError):
        return []
    return value if isinstance(value, list) else []


def _onnx_place(node: onnx.NodeProto) -> str:
    scopes = _onnx_list(node, _SCOPES)[:-1]  # the last entry is the operation itself
    return str(scopes[-1]) if scopes else ""
