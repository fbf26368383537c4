"""One node of an ONNX graph as a rule sees it: its inputs, its attributes, and the torch graph it writes to.

A value of an ONNX graph is one of three things while it is read: a node of the torch graph, a constant tensor, or
``Sizes``: integers that were computed from shapes, which torch keeps as Python numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from rmfx.errors import OnnxImportError
from rmfx.onnx_in.writer import Writer

Size = int | fx.Node


@dataclass(frozen=True)
class Sizes:
    """A vector of integers that come from shapes; ``scalar`` when it is a single one without dimension."""

    items: tuple[Size, ...]
    scalar: bool = False


Value = fx.Node | Tensor | Sizes
Rule = Callable[["Call"], "Value | tuple[Value, ...]"]
Rules = dict[str, Rule]


class Call:
    """One ONNX node with its inputs read so far.

    Args:
        node: the node.
        opset: version of the standard operators.
        inputs: what was read, ``None`` for optional inputs that are left out.
        writer: where rules write to.
    """

    def __init__(self, node: ir.Node, opset: int, inputs: Sequence[Value | None], writer: Writer) -> None:
        self.node, self.opset, self.inputs, self.writer = node, opset, tuple(inputs), writer

    # -- reading ------------------------------------------------------------------------------------------------------

    def has(self, index: int) -> bool:
        """Whether input ``index`` is given."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def value(self, index: int) -> Value:
        """Input ``index``, as whatever it is."""
        if not self.has(index):
            self.fail(f"its input {index} is missing")
        value = self.inputs[index]
        assert value is not None
        return value

    def tensor(self, index: int = 0) -> fx.Node:
        """Input ``index`` as a node of the torch graph."""
        value = self.value(index)
        if isinstance(value, Sizes):
            self.fail(f"its input {index} is computed from shapes, which this operator cannot read here")
        if isinstance(value, Tensor):
            return self.writer.constant(value, self._input_name(index))
        return value

    def constant(self, index: int, what: str) -> Tensor:
        """Input ``index``, which must be known without running the network; ``what`` names it in the message."""
        value = self.value(index)
        if not isinstance(value, Tensor):
            self.fail(f"its {what} is computed from the network's input, and rmfx needs it as a constant")
        return value

    def optional(self, index: int, what: str) -> Tensor | None:
        """Input ``index`` as a constant, ``None`` where it is left out or empty."""
        if not self.has(index):
            return None
        found = self.constant(index, what)
        return found if found.numel() else None

    def sizes(self, index: int, what: str) -> Sizes:
        """Input ``index`` as integers: a constant, or computed from shapes."""
        value = self.value(index)
        if isinstance(value, Sizes):
            return value
        found = self.constant(index, what)
        return Sizes(tuple(int(item) for item in found.flatten()), found.dim() == 0)

    def ints(self, index: int, name: str) -> list[int] | None:
        """Integers that older opsets keep in attribute ``name`` and newer ones in input ``index``."""
        if name in self.node.attributes:
            return [int(item) for item in self.node.attributes[name].as_ints()]
        found = self.optional(index, name)
        return None if found is None else [int(item) for item in found.flatten()]

    def attribute(self, name: str, default: Any = None) -> Any:
        """Attribute ``name``: a number, text, or a tuple of them."""
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    def shape(self, index: int = 0) -> tuple[int | None, ...] | None:
        """The shape of input ``index``, ``None`` where a size is free; ``None`` when not even the rank is known."""
        value = self.node.inputs[index]
        return None if value is None else shape_of(value)

    def rank(self, index: int = 0) -> int:
        """The number of dimensions of input ``index``, which must be known."""
        shape = self.shape(index)
        if shape is None:
            self.fail("the number of dimensions of its input is not known: run onnx.shape_inference on the file first")
        return len(shape)

    def dtype(self, index: int = 0) -> torch.dtype | None:
        """The dtype of input ``index``, where known."""
        value = self.node.inputs[index]
        return None if value is None or value.dtype is None else DTYPES.get(value.dtype)

    def _input_name(self, index: int) -> str:
        value = self.node.inputs[index]
        return (value.name if value is not None else None) or "constant"

    # -- writing ------------------------------------------------------------------------------------------------------

    def layer(self, module: nn.Module, source: fx.Node | None = None) -> fx.Node:
        """Call ``module`` on ``source``, by default on input 0."""
        return self.writer.layer(self.node, module, self.tensor() if source is None else source)

    def function(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Call a torch function."""
        return self.writer.function(self.node, function, args, **kwargs)

    def method(self, name: str, *args: Any) -> fx.Node:
        """Call a method of the tensor ``args[0]``."""
        return self.writer.method(self.node, name, args)

    def fail(self, reason: str) -> NoReturn:
        """Raise for this node.

        Raises:
            OnnxImportError: always; names node, operator, opset and ``reason``.
        """
        domain = f"{self.node.domain}." if self.node.domain not in ("", "ai.onnx") else ""
        name = self.node.name or self.node.outputs[0].name
        raise OnnxImportError(
            f"{self.writer.file}: node {name!r} ({domain}{self.node.op_type}, opset {self.opset}) "
            f"cannot be imported: {reason}"
        )


DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.BOOL: torch.bool,
}


def shape_of(value: ir.Value) -> tuple[int | None, ...] | None:
    """What the file tells of a value's shape."""
    if value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """A torch tensor with its own memory.

    >>> as_tensor(np.float32([1, 2])).tolist()
    [1.0, 2.0]
    """
    array = np.array(array)  # external data is a read-only map of the file
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
