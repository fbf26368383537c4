"""Opens an ONNX file: valid, functions inlined, constants folded, shapes inferred. Computes nothing of the network.

Constants are folded by onnxscript in the dtype of the file, as onnxruntime does it. No other optimiser runs: a norm
stays a norm, so that its weights are folded once and in float64, by rmfx.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from rmfx.errors import OnnxImportError
from rmfx.quiet import quiet

OLDEST_OPSET = 7  # before it, Add and Mul broadcast by attributes of their own
_STANDARD = ("", "ai.onnx")
_UNLIMITED = 2**62


@dataclass(frozen=True, eq=False)
class Opened:
    """A model ready to be read node by node, with the version of its operators."""

    path: Path
    model: ir.Model
    opset: int


def open_file(path: str | os.PathLike[str]) -> Opened:
    """Read and simplify the file at ``path``.

    Raises:
        OnnxImportError: when there is no such file, it is no valid ONNX, or its operators are too old.
    """
    path = Path(path)
    if not path.is_file():
        raise OnnxImportError(f"there is no file {path}")
    try:
        onnx.checker.check_model(os.fspath(path))  # by path, so that files beyond 2 GiB can be checked
        model = ir.load(path)
    except Exception as problem:  # protobuf, onnx and onnx-ir raise classes of their own
        raise OnnxImportError(f"{path} is no valid ONNX file: {_first_line(problem)}") from problem
    _demand_data(model, path)
    opset = next((model.opset_imports[domain] for domain in _STANDARD if domain in model.opset_imports), None)
    if opset is None or opset < OLDEST_OPSET:
        raise OnnxImportError(
            f"{path} is of opset {opset}, rmfx reads {OLDEST_OPSET} and later: "
            "onnx.version_converter.convert_version brings it there"
        )
    _free_sizes(model)
    with quiet():
        _simplify(model)
    return Opened(path, model, opset)


def _demand_data(model: ir.Model, path: Path) -> None:
    """Find data in files of their own that is not all there; what is there is only mapped."""
    for name, value in model.graph.initializers.items():
        try:
            assert value.const_value is not None
            value.const_value.numpy()
        except Exception as problem:  # numpy's and onnx-ir's classes
            raise OnnxImportError(f"{path}: the data of {name!r} cannot be read: {_first_line(problem)}") from problem


def _free_sizes(model: ir.Model) -> None:
    """Sizes below 0 are free, as onnxruntime has it; shape inference would compute with them."""
    values = (output for node in model.graph for output in node.outputs)
    for value in (*model.graph.inputs, *model.graph.outputs, *values):
        if value.shape is not None:
            sizes = (None if isinstance(size, int) and size < 0 else size for size in value.shape)
            value.shape = ir.Shape(sizes)


def _simplify(model: ir.Model) -> None:
    """Leave one graph in which every value that depends on no input is an initializer."""
    lift = common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)
    common.InlinePass()(model)
    common.RemoveInitializersFromInputsPass()(model)  # files of old give each weight as an input, too
    lift(model)
    optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=_UNLIMITED,
        output_size_limit=_UNLIMITED,
        should_fold=_is_deterministic,
    )
    lift(model)
    common.RemoveUnusedNodesPass()(model)


def _is_deterministic(node: ir.Node) -> bool | None:
    return False if node.op_type.startswith(("Random", "Multinomial", "Bernoulli")) else None


def _first_line(problem: Exception) -> str:
    return next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
