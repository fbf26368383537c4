"""What an ONNX file says of its inputs and outputs: names, types, sizes, and which sizes are free."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor

from rmfx.errors import OnnxImportError

_DTYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.BOOL: torch.bool,
}


@dataclass(frozen=True)
class Input:
    """One input: ``shape`` holds a name, or "?", where a size is free."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of one file, in order."""

    file: str
    opset: int
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]

    @property
    def batched(self) -> tuple[bool, ...]:
        """For each input, whether its first size is free."""
        return tuple(bool(entry.shape) and isinstance(entry.shape[0], str) for entry in self.inputs)

    @property
    def free(self) -> tuple[str, ...]:
        """Free sizes besides the first of each input, as ``"x[2] (height)"``."""
        return tuple(
            f"{entry.name}[{axis}] ({size})"
            for entry in self.inputs
            for axis, size in enumerate(entry.shape)
            if axis and isinstance(size, str)
        )

    def examples(self, sizes: tuple[int, ...] | None = None, *, batch: int = 1, seed: int = 0) -> tuple[Tensor, ...]:
        """Random inputs of the sizes in the file.

        Args:
            sizes: of the first input, without the batch; fills in what the file leaves free. One number stands for all
                free sizes.
            batch: where the batch is free.
            seed: of the values.

        Raises:
            OnnxImportError: when a free size is not given, or a given one contradicts the file.
        """
        generator = torch.Generator().manual_seed(seed)
        shapes = [self._shape(entry, sizes if index == 0 else None, batch) for index, entry in enumerate(self.inputs)]
        return tuple(_drawn(shape, entry.dtype, generator) for shape, entry in zip(shapes, self.inputs, strict=True))

    def _shape(self, entry: Input, sizes: tuple[int, ...] | None, batch: int) -> tuple[int, ...]:
        wanted = list(entry.shape)
        if wanted and isinstance(wanted[0], str):
            wanted[0] = batch
        if sizes is not None:
            given = [*wanted[:1], *(sizes if len(sizes) > 1 else _filled(wanted[1:], sizes[0]))]
            pairs = itertools.zip_longest(wanted, given)
            if any(old != new and not (isinstance(old, str) and new) for old, new in pairs):
                raise OnnxImportError(f"{self.file}: the input {entry.name!r} is of shape {_shown(entry)}, not {given}")
            wanted = given
        if missing := [str(size) for size in wanted if isinstance(size, str)]:
            raise OnnxImportError(
                f"{self.file}: the input {entry.name!r} of shape {_shown(entry)} leaves {', '.join(missing)} free: "
                "give --input-shape on the command line, example_inputs in Python"
            )
        return tuple(size for size in wanted if isinstance(size, int))


def read_signature(path: str | os.PathLike[str]) -> Signature:
    """Read names, types and shapes; weights are not read.

    Raises:
        OnnxImportError: when ``path`` is no ONNX file, or an input is no tensor of a known type.
    """
    path = os.fspath(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as problem:  # OSError, or one of protobuf's own
        raise OnnxImportError(f"cannot read {path} as ONNX: {problem}") from problem
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(_input(path, entry) for entry in model.graph.input if entry.name not in constants)
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    return Signature(os.path.basename(path), opset, inputs, tuple(entry.name for entry in model.graph.output))


def _input(path: str, entry: onnx.ValueInfoProto) -> Input:
    tensor = entry.type.tensor_type
    if tensor.elem_type not in _DTYPES or not tensor.HasField("shape"):
        raise OnnxImportError(f"{path}: the input {entry.name!r} is no tensor whose type and dimensions are known")
    shape = tuple(_size(size) for size in tensor.shape.dim)
    return Input(entry.name, _DTYPES[tensor.elem_type], shape)


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | str:
    """A negative number is a free size, as onnxruntime has it: exporters write -1."""
    fixed = dim.HasField("dim_value") and dim.dim_value >= 0
    return dim.dim_value if fixed else dim.dim_param or "?"


def _filled(shape: list[int | str], size: int) -> list[int | str]:
    """``shape`` with its free sizes, or where there are none all but the channels, replaced by ``size``."""
    free = [index for index, old in enumerate(shape) if isinstance(old, str)] or range(1, len(shape))
    return [size if index in free else old for index, old in enumerate(shape)]


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.zeros(shape, dtype=dtype)  # indices into a table of unknown length


def _shown(entry: Input) -> str:
    return "x".join(map(str, entry.shape))
