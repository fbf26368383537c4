"""An ONNX file in, a torch network out, which was seen to compute what onnxruntime makes of the file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from torch import Tensor, fx

from rmfx.deploy import runtime
from rmfx.deploy.onnx_check import check_file
from rmfx.deploy.signature import Signature, read_signature
from rmfx.errors import ExportError, OnnxImportError, RmfxError, VerificationError
from rmfx.onnx_in import arithmetic, linear, pointwise, pooling, shaping
from rmfx.onnx_in.call import DTYPES, Call, Rules, Value, as_tensor
from rmfx.onnx_in.reading import Opened, open_file
from rmfx.onnx_in.writer import Writer

RULES: Rules = {**linear.RULES, **pooling.RULES, **pointwise.RULES, **arithmetic.RULES, **shaping.RULES}
_STANDARD = ("", "ai.onnx")


def from_onnx(
    path: str | os.PathLike[str],
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    check: bool = True,
) -> fx.GraphModule:
    """The network of an ONNX file as a torch module, which every function of rmfx takes.

    Operators are mapped one by one onto layers and functions of torch (:data:`RULES`). The result is then compared
    with the file as onnxruntime runs it, by the rule of :mod:`rmfx.deploy.onnx_check`: batch 1 and 3 where the batch is
    free, inputs far beyond 6, the graph optimiser off and on.

    Args:
        path: the file; weights beside it in files of their own are found.
        example_inputs: for the comparison; needed only where the file leaves sizes free besides the batch.
        check: compare with onnxruntime.

    Returns:
        A ``GraphModule`` in eval mode, whose inputs come in the order of the file. Norms are kept as they are.

    Raises:
        OnnxImportError: when the file cannot be read, or a node cannot be imported; names the node and the operator.
        VerificationError: when the result differs from what onnxruntime computes.
        RuntimeUnavailableError: when onnxruntime is not installed; ``check=False`` does without.

    >>> import pathlib, tempfile, torch, rmfx
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.onnx"
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()
    >>> _ = rmfx.export(model, path, torch.ones(1, 3, 8, 8))
    >>> [type(layer).__name__ for layer in from_onnx(path).children()]
    ['Conv2d', 'ReLU']
    """
    if check:
        runtime.require("cpu")
    opened = open_file(path)
    network = _write(opened)
    if check:
        _compare(network, opened, read_signature(path), example_inputs)
    return network


def _write(opened: Opened) -> fx.GraphModule:
    graph = opened.model.graph
    writer = Writer(opened.path.name, graph)
    values: dict[ir.Value, Value] = {entry: writer.input(str(entry.name)) for entry in graph.inputs}
    constants = _Constants(opened.path.name)
    for node in graph:
        inputs = [None if value is None else _read(value, values, constants) for value in node.inputs]
        _lower(Call(node, opened.opset, inputs, writer), values)
    outputs = [_output(writer, entry, _read(entry, values, constants)) for entry in graph.outputs]
    return writer.finish(outputs, "OnnxNetwork")


def _read(value: ir.Value, values: dict[ir.Value, Value], constants: _Constants) -> Value:
    return values[value] if value in values else constants.read(value)


def _lower(call: Call, values: dict[ir.Value, Value]) -> None:
    """Write the torch operations of one node, and note what its outputs became."""
    rule = RULES.get(call.node.op_type) if call.node.domain in _STANDARD else None
    if rule is None:
        call.fail("rmfx has no rule for this operator")
    try:
        made = rule(call)
    except OnnxImportError:
        raise
    except (ArithmeticError, AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as problem:
        # A layer of torch that refuses its arguments, or a file whose attributes contradict one another.
        call.fail(f"{type(problem).__name__}: {problem}")
    outputs = made if isinstance(made, tuple) else (made,)
    values.update(zip(call.node.outputs, outputs, strict=False))


def _output(writer: Writer, entry: ir.Value, value: Value) -> fx.Node:
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, Tensor):
        return writer.constant(value, str(entry.name))
    raise OnnxImportError(
        f"{writer.file}: the output {entry.name!r} holds sizes and no tensor, which cannot be imported"
    )


class _Constants:
    """Tensors of the file, each made once, so that weights that are shared stay shared."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._made: dict[ir.Value, Tensor] = {}

    def read(self, value: ir.Value) -> Tensor:
        if value not in self._made:
            if value.const_value is None:
                raise OnnxImportError(f"{self._file}: the value {value.name!r} is made by no node")
            if value.const_value.dtype not in DTYPES:
                raise OnnxImportError(
                    f"{self._file}: the constant {value.name!r} is {value.const_value.dtype}, no type of torch's"
                )
            self._made[value] = as_tensor(value.const_value.numpy())
        return self._made[value]


def _compare(network: fx.GraphModule, opened: Opened, signature: Signature, example_inputs: Any) -> None:
    examples = signature.examples() if example_inputs is None else example_inputs
    inputs = (examples,) if isinstance(examples, Tensor) else tuple(examples)
    try:
        check_file(opened.path, network, inputs, signature.batched, "cpu")
    except ExportError as problem:
        raise VerificationError(f"{opened.path}, imported, does not compute what the file does: {problem}") from problem
    except RmfxError:
        raise
    except Exception as problem:  # torch raises many classes
        shapes = ", ".join(str(tuple(value.shape)) for value in inputs)
        raise OnnxImportError(
            f"{opened.path}, imported, does not run on inputs of shape {shapes}: {problem}"
        ) from problem
