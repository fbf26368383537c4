"""Small ONNX files, one for each way to write each operator that :mod:`rmfx.onnx_in` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

IMAGE = ("batch", 4, 7, 8)


@dataclass(frozen=True)
class Case:
    """One node on the input ``x``: other inputs are constants, ``None`` where one is left out."""

    op: str
    constants: Sequence[Any] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    shape: tuple[Any, ...] = IMAGE
    opset: int = 21
    outputs: int = 1
    integers: bool = False

    def __str__(self) -> str:
        shown = "-".join(f"{name}={value}" for name, value in self.attributes.items())
        return f"{self.op}-{self.opset}-{shown}".replace(" ", "").rstrip("-")


def draw(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random floats of both signs."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray[Any, Any]:
    """A vector of integers, as shapes and axes are."""
    return np.array(values, np.int64)


def f32(value: Any) -> np.ndarray[Any, Any]:
    """A float constant."""
    return np.array(value, np.float32)


def write(path: Path, nodes: Sequence[onnx.NodeProto], **options: Any) -> Path:
    """A file of ``nodes`` from ``x`` to their last outputs.

    ``constants`` by name, ``inputs`` as name to shape, ``outputs`` as names, ``opset`` and ``element`` type of inputs.
    """
    element = options.get("element", TensorProto.FLOAT)
    shapes = options.get("inputs", {"x": IMAGE})
    inputs = [helper.make_tensor_value_info(name, element, list(shape)) for name, shape in shapes.items()]
    outputs = [onnx.ValueInfoProto(name=name) for name in options.get("outputs", list(nodes[-1].output))]
    if nodes[-1].op_type == "GroupNormalization":  # onnx infers no type for it
        outputs = [helper.make_tensor_value_info(nodes[-1].output[0], element, list(shapes["x"]))]
    constants = [numpy_helper.from_array(value, name) for name, value in options.get("constants", {}).items()]
    graph = helper.make_graph(list(nodes), "graph", inputs, outputs, constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", options.get("opset", 21))], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(made)
    onnx.save(inferred, str(path))
    return path


def write_case(path: Path, case: Case) -> Path:
    """The file of one case."""
    names = {f"c{i}": value for i, value in enumerate(case.constants) if value is not None}
    inputs = ["x", *("" if value is None else f"c{i}" for i, value in enumerate(case.constants))]
    outputs = [f"y{i}" for i in range(case.outputs)]
    node = helper.make_node(case.op, inputs, outputs, name="the_node", **case.attributes)
    element = TensorProto.INT64 if case.integers else TensorProto.FLOAT
    return write(path, [node], constants=names, inputs={"x": case.shape}, opset=case.opset, element=element)


_BN = (draw(4), draw(4, seed=1), draw(4, seed=2), np.abs(draw(4, seed=3)) + 0.5)
_UNARY_NAMES = """
    Abs Ceil Cos Erf Floor Identity Neg Relu Round Sigmoid Sign Sin Softplus Softsign Tanh
    Elu Celu LeakyRelu Selu Gelu HardSigmoid HardSwish Mish Shrink ThresholdedRelu Clip Dropout
"""
_BINARY_NAMES = "Add Sub Mul Div Max Min Sum Mean"
_COMPARISONS = "Equal Greater GreaterOrEqual Less LessOrEqual"
_SCALES = f32([1, 1, 2, 3])
_TWOS = f32([1, 1, 2, 2])
_HALF = {"coordinate_transformation_mode": "half_pixel"}

CASES = [
    *(Case(op) for op in _UNARY_NAMES.split()),
    Case("Exp", shape=("batch", 2)),
    Case("Selu", attributes={"alpha": 1.5, "gamma": 2.0}),
    Case("Gelu", attributes={"approximate": "tanh"}),
    Case("HardSigmoid", attributes={"alpha": 1 / 6}),
    Case("Shrink", attributes={"bias": 0.5}),
    Case("Dropout", (f32(0.5), np.array(False))),
    Case("Dropout", attributes={"ratio": 0.5}, opset=11),
    Case("Clip", (f32(0), f32(6))),
    Case("Clip", (f32(0), None)),
    Case("Clip", (None, f32(2.5))),
    Case("Clip", (f32(3), f32(-3))),
    Case("Clip", (f32(-1), f32(np.finfo(np.float32).max))),
    Case("Clip", attributes={"min": 0.0}, opset=10),
    Case("Clip", attributes={"min": 1.0, "max": 1.0}, opset=10),
    Case("PRelu", (draw(4, 1, 1),)),
    Case("PRelu", (draw(1),), shape=("batch", 4)),
    Case("PRelu", (draw(8),)),
    Case("Softmax"),
    Case("Softmax", attributes={"axis": 3}, opset=11),
    Case("Softmax", shape=("batch", 4), opset=11),
    Case("LogSoftmax", attributes={"axis": 1}),
    # Convolutions and linear layers
    Case("Conv", (draw(6, 4, 3, 3), draw(6)), {"pads": [1, 1, 1, 1], "strides": [2, 1], "dilations": [1, 2]}),
    Case("Conv", (draw(6, 4, 3, 2),), {"pads": [0, 1, 2, 0]}),
    Case("Conv", (draw(6, 2, 3, 3),), {"group": 2, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Case("Conv", (draw(6, 4, 2, 4),), {"auto_pad": "SAME_LOWER"}),
    Case("Conv", (draw(6, 4, 3, 3),), {"auto_pad": "VALID"}),
    Case("Conv", (draw(6, 4, 3), draw(6)), {"pads": [1, 1]}, ("batch", 4, 9), opset=7),
    Case("Conv", (draw(6, 4, 1, 2, 3),), {"pads": [0, 0, 1, 0, 1, 1]}, ("batch", 4, 3, 4, 5), opset=22),
    Case("ConvTranspose", (draw(4, 3, 3, 3), draw(6)), {"group": 2, "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Case("ConvTranspose", (draw(4, 3, 3, 3),), {"strides": [2, 2], "pads": [1, 1, 0, 1], "output_padding": [0, 1]}),
    Case("Gemm", (draw(5, 8), draw(5)), {"transB": 1}, ("batch", 8)),
    Case("Gemm", (draw(8, 5), draw(1, 1)), {"alpha": 0.5, "beta": 2.0}, ("batch", 8)),
    Case("Gemm", (draw(8, 5),), shape=("batch", 8)),
    Case("Gemm", (draw(8, 5), draw(6, 5)), {"alpha": 0.5, "beta": 2.0}, (6, 8)),
    Case("Gemm", (draw(8, 5),), {"transA": 1}, (8, 6)),
    Case("MatMul", (draw(8, 5),)),
    Case("MatMul", (draw(4, 8, 5),)),
    Case("Einsum", (draw(4, 5),), {"equation": "bchw,cd->bdhw"}),
    Case("BatchNormalization", _BN, {"epsilon": 1e-3}),
    Case("BatchNormalization", _BN, shape=("batch", 4), opset=9),
    Case("InstanceNormalization", _BN[:2], {"epsilon": 1e-3}),
    Case("GroupNormalization", _BN[:2], {"num_groups": 2}),
    Case("LayerNormalization", (draw(8), draw(8)), opset=17),
    Case("LayerNormalization", (draw(7, 8),), {"axis": 2, "epsilon": 1e-3}),
    Case("LayerNormalization", (draw(4, 1, 1), draw(8)), {"axis": 1}),
    Case("LRN", attributes={"size": 3, "alpha": 0.1}),
    # Pools, padding, resizing
    Case("MaxPool", attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Case("MaxPool", attributes={"kernel_shape": [2, 2], "pads": [1, 0, 0, 1], "dilations": [2, 1]}),
    Case("MaxPool", attributes={"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    Case("MaxPool", attributes={"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("AveragePool", attributes={"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0]}),
    Case("AveragePool", attributes={"kernel_shape": [3, 3], "pads": [0, 1, 1, 2], "count_include_pad": 1}),
    Case("GlobalAveragePool"),
    Case("GlobalAveragePool", shape=("batch", 4, 9)),
    Case("GlobalMaxPool"),
    Case("Pad", (ints(0, 0, 1, 0, 0, 0, 2, 1),)),
    Case("Pad", (ints(0, 0, 1, 0, 0, 0, 2, 1), f32(2.5))),
    Case("Pad", (ints(0, 1, 0, 0, 0, 2, 0, 0),)),
    Case("Pad", (ints(0, 0, -1, 0, 0, 0, 0, -2),)),
    Case("Pad", (ints(1, 2), None, ints(-1)), {"mode": "edge"}, opset=19),
    Case("Pad", (ints(0, 0, 1, 2, 0, 0, 2, 1),), {"mode": "reflect"}),
    Case("Pad", (ints(0, 0, 1, 2, 0, 0, 2, 1),), {"mode": "wrap"}),
    Case("Pad", attributes={"pads": [0, 0, 1, 0, 0, 0, 0, 0], "value": -1.0}, opset=10),
    Case("Resize", (None, _SCALES), {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    Case("Resize", (None, _TWOS), _HALF),
    Case("Resize", (None, None, ints(1, 4, 14, 8)), _HALF, shape=(1, 4, 7, 8)),
    Case("Resize", (None, _SCALES), {"mode": "linear"}),
    Case("Resize", (None, None, ints(1, 4, 9, 5)), {"mode": "linear"}, shape=(1, 4, 7, 8)),
    Case(
        "Resize",
        (f32([]), _SCALES),
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
        opset=11,
    ),
    Case("Resize", (None, _TWOS), {"mode": "cubic"}),
    Case("Resize", (_SCALES,), opset=10),
    Case("Upsample", (_SCALES,), opset=9),
    Case("Upsample", attributes={"scales": [1.0, 1.0, 2.0, 2.0]}, opset=7),
    Case("DepthToSpace", attributes={"blocksize": 2}, shape=("batch", 8, 3, 2)),
    Case("DepthToSpace", attributes={"blocksize": 2, "mode": "CRD"}, shape=("batch", 8, 3, 2)),
    Case("SpaceToDepth", attributes={"blocksize": 2}, shape=("batch", 3, 4, 6)),
    # Arithmetic
    *(Case(op, (draw(4, 1, 1),)) for op in _BINARY_NAMES.split()),
    Case("Sum", (draw(4, 1, 1), draw(8))),
    Case("Sum"),
    Case("Max", (draw(4, 1, 1), draw(8))),
    Case("Mul", (f32(0.5),)),
    Case("Add", (f32([0.5]),)),
    Case("Pow", (f32(2),)),
    Case("Pow", (f32(2),), integers=True),
    Case("Pow", (f32([0, 1, 2, 3, 2, 1, 2, 2.5]),), integers=True),
    Case("Pow", (np.array([2.0] * 8),)),
    Case("Div", (ints(2),), shape=(3,), integers=True),
    Case("Mod", (ints(3),), shape=(3,), integers=True),
    Case("Mod", (f32(1.5),), {"fmod": 1}),
    *(Case(op, (f32(0.25),)) for op in _COMPARISONS.split()),
    Case("Cast", attributes={"to": TensorProto.INT64}),
    Case("Cast", attributes={"to": TensorProto.FLOAT}),
    Case("CastLike", (ints(0),)),
    Case("ReduceMean", (ints(2, 3),), opset=18),
    Case("ReduceMean", attributes={"axes": [-1, -2], "keepdims": 0}, opset=13),
    Case("ReduceMean", attributes={"axes": [1]}, opset=13),
    Case("ReduceMean", attributes={"keepdims": 1}, shape=(2, 3), opset=13),
    Case("ReduceMean", attributes={"noop_with_empty_axes": 1}, opset=18),
    Case("ReduceSum", (ints(1),)),
    Case("ReduceSum", attributes={"axes": [1]}, opset=11),
    Case("ReduceMax", (ints(2, 3),), {"keepdims": 0}),
    Case("ReduceMin", (ints(-1),)),
    Case("ReduceL2", (ints(1),)),
    Case("ArgMax", attributes={"axis": 1}),
    Case("ArgMin", attributes={"axis": -1, "keepdims": 0}),
    # Shapes
    Case("Reshape", (ints(0, -1),)),
    Case("Reshape", (ints(-1, 224),)),
    Case("Reshape", (ints(0, 2, 2, 0, -1),)),
    Case("Flatten", attributes={"axis": 4}),
    Case("Flatten", shape=(5,)),
    Case("Flatten"),
    Case("Flatten", attributes={"axis": 0}),
    Case("Flatten", attributes={"axis": -1}),
    Case("Squeeze", (ints(1),), shape=("batch", 1, 5)),
    Case("Squeeze", shape=(2, 1, 5)),
    Case("Unsqueeze", (ints(-1, 0),)),
    Case("Unsqueeze", attributes={"axes": [2]}, opset=11),
    Case("Transpose"),
    Case("Transpose", attributes={"perm": [0, 2, 3, 1]}),
    Case("Concat", (draw(2, 4, 7, 1),), {"axis": -1}, (2, 4, 7, 8)),
    Case("Split", (ints(1, 3),), {"axis": 1}, outputs=2),
    Case("Split", attributes={"axis": 3, "num_outputs": 3}, outputs=3),
    Case("Split", attributes={"axis": 1, "split": [3, 1]}, opset=11, outputs=2),
    Case("Slice", (ints(1), ints(2**63 - 1), ints(1))),
    Case("Slice", (ints(-3, 1), ints(-1, 6), ints(-1, 2), ints(1, 2))),
    Case("Slice", (ints(-1), ints(-(2**63) + 1), ints(3), ints(-1))),
    Case("Slice", (ints(100), ints(-100), ints(3), ints(-1))),
    Case("Slice", (ints(7), ints(-9), ints(3), ints(-1))),
    Case("Slice", attributes={"starts": [1], "ends": [3], "axes": [1]}, opset=9),
    Case("Gather", (ints(2, 0, -1),), {"axis": 1}),
    Case("Gather", (np.array(1, np.int64),), {"axis": -1}),
    Case("Expand", (ints(3, 1, 4, 7, 1),), shape=(1, 4, 7, 8)),
    Case("Tile", (ints(1, 2, 1, 3),)),
]


def _node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=outputs.split()[0], **attributes)


# Graphs of several nodes: name to nodes, constants and outputs.
GRAPHS: dict[str, tuple[list[onnx.NodeProto], dict[str, Any], list[str]]] = {
    "logic": (
        [
            _node("Greater", "x low", "above"),
            _node("Less", "x high", "below"),
            _node("And", "above below", "between"),
            _node("Or", "above below", "any"),
            _node("Xor", "above below", "one"),
            _node("Not", "between", "outside"),
            _node("Where", "outside x low", "y"),
        ],
        {"low": f32(-0.5), "high": f32(0.5)},
        ["y", "any", "one"],
    ),
    "positive": (
        [
            _node("Abs", "x", "a"),
            _node("Add", "a one", "p"),
            _node("Log", "p", "l"),
            _node("Sqrt", "p", "s"),
            _node("Reciprocal", "p", "r"),
        ],
        {"one": f32(1)},
        ["l", "s", "r"],
    ),
    "view by batch": (
        [
            _node("Shape", "x", "shape"),
            _node("Gather", "shape zero", "n"),
            _node("Unsqueeze", "n axis", "n1"),
            _node("Concat", "n1 rest", "target", axis=0),
            _node("Reshape", "x target", "y"),
        ],
        {"zero": np.array(0, np.int64), "axis": ints(0), "rest": ints(-1)},
        ["y"],
    ),
    "arithmetic on sizes": (
        [
            _node("Shape", "x", "shape", start=0, end=2),
            _node("Slice", "shape begin end axis", "n"),
            _node("Mul", "n two", "n2"),
            _node("Cast", "n2", "n2l", to=TensorProto.INT64),
            _node("Size", "x", "all"),
            _node("Div", "all two", "half"),
            _node("Sub", "half half", "nothing"),
            _node("Add", "n2l nothing", "same"),
            _node("Concat", "same rest", "target", axis=0),
            _node("Reshape", "x target", "y"),
            _node("Squeeze", "n axis", "n0"),
            _node("Unsqueeze", "n0 axis", "n1"),
            _node("Concat", "n1 sizes", "wide", axis=0),
            _node("Expand", "row wide", "z"),
            _node("ConstantOfShape", "wide", "ones", value=numpy_helper.from_array(f32([1.5]))),
        ],
        {
            "begin": ints(0),
            "end": ints(1),
            "axis": ints(0),
            "two": ints(2),
            "rest": ints(-1),
            "sizes": ints(3, 1),
            "row": f32([[1, 2]]),
        },
        ["y", "z", "ones"],
    ),
    "shared and unused": (
        [
            _node("Conv", "x w", "a", pads=[1, 1, 1, 1]),
            _node("Relu", "a", "b"),
            _node("Conv", "b w", "c", pads=[1, 1, 1, 1]),
            _node("Sin", "c", "unused"),
            _node("Identity", "c", "d"),
            _node("Add", "d x", "y"),
        ],
        {"w": draw(4, 4, 3, 3)},
        ["y", "b"],
    ),
}
