"""Networks in half precision: rounded copies, ranges that must fit, and how far rounding takes them from the truth.

The weights of a copy are rounded, and the copy is exported; inputs and outputs keep their type, by casts at the border.
What a half type costs is not known beforehand. It is measured: :func:`gap`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, numpy_helper
from onnx_ir import tensor_adapters
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rmfx.copying import deep_copy
from rmfx.deploy.onnx_check import outputs_of
from rmfx.deploy.session import Session
from rmfx.errors import ExportError

Precision = Literal["fp32", "fp16", "bf16"]
BF16_OPSET = 22  # before it, ONNX has no convolution in bfloat16
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Rounded(nn.Module):
    """``network`` with its weights in ``dtype``, taking and giving tensors of another type.

    Args:
        network: copied.
        dtype: of weights and arithmetic. As of any module, ``.double()`` makes it exact arithmetic on rounded weights.

    >>> y = Rounded(nn.Linear(4, 2), torch.bfloat16)(torch.ones(1, 4))
    >>> y.dtype, bool((y == y.bfloat16()).all())
    (torch.float32, True)
    """

    like: Tensor

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = deep_copy(network).to(dtype)
        place = next((p.device for p in (*network.parameters(), *network.buffers())), torch.device("cpu"))
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=place), persistent=False)
        self.train(network.training)

    def forward(self, *inputs: Tensor) -> Any:
        outer = next((value.dtype for value in inputs if value.is_floating_point()), self.like.dtype)
        result = self.network(*(cast(value, self.like.dtype) for value in inputs))
        return pytree.tree_map_only(Tensor, lambda value: cast(value, outer), result)


@dataclass(frozen=True)
class Form:
    """A network as it is written to a file, and as the file is compared with it.

    Attributes:
        original: the network that was given.
        written, inside: what is exported, on which inputs.
        expected, inputs: what the file must compute, on which inputs.
        dtype: of weights and arithmetic; ``None`` where nothing was rounded.
        outer: of inputs and outputs, where that is another one.
    """

    original: nn.Module
    written: nn.Module
    inside: tuple[Tensor, ...]
    expected: nn.Module
    inputs: tuple[Tensor, ...]
    dtype: torch.dtype | None = None
    outer: torch.dtype | None = None


def form_of(
    network: nn.Module, inputs: tuple[Tensor, ...], precision: Precision | None, io: Literal["same", "half"]
) -> Form:
    """``network`` as it is written in ``precision``; arguments and errors are those of :func:`rmfx.export`."""
    if precision is None:
        return Form(network, network, inputs, network, inputs)
    dtype = DTYPES[precision]
    demand_ranges(network, inputs, dtype)
    rounded = Rounded(network, dtype)
    inside = tuple(cast(value, dtype) for value in inputs)
    if io == "half":
        return Form(network, rounded.network, inside, rounded.network, inside, dtype)
    outer = next((value.dtype for value in inputs if value.is_floating_point()), dtype)
    return Form(network, rounded.network, inside, rounded, inputs, dtype, outer if outer != dtype else None)


def cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` in ``dtype`` if it is of floating point, else as it is."""
    return value.to(dtype) if value.is_floating_point() else value


def demand_ranges(model: nn.Module, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Raise where a weight, or a value that ``inputs`` lead to, is beyond the largest number of ``dtype``.

    Values are those that enter and leave modules, in float64.

    Raises:
        ExportError: naming the layer and the value.
    """
    largest = torch.finfo(dtype).max
    exact = deep_copy(model).double()
    for name, weight in (*exact.named_parameters(), *exact.named_buffers()):
        _demand_below(largest, weight.detach()[weight.isfinite()], f"the weight {name!r}", dtype)

    def watch(name: str, kind: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, given: Any, result: Any) -> None:
            for what, values in (("input", given), ("output", result)):
                for value in pytree.tree_leaves(values):
                    if isinstance(value, Tensor) and value.is_floating_point():
                        _demand_below(largest, value, f"on the example inputs the {what} of {name!r} ({kind})", dtype)

        return hook

    for name, module in exact.named_modules():
        module.register_forward_hook(watch(name or "the network", type(module).__name__))
    outputs_of(exact, [cast(value, torch.float64) for value in inputs])


def _demand_below(largest: float, value: Tensor, what: str, dtype: torch.dtype) -> None:
    found = float(value.abs().max()) if value.numel() else 0.0
    if not found <= largest:
        raise ExportError(
            f"{what} reaches {found:.6g}, and {dtype} ends at {largest:.6g}: choose another precision, or scale the "
            "network's weights"
        )


def gap(
    model: nn.Module,
    inputs: Sequence[Tensor],
    precision: Precision,
    path: Path | None = None,
    device: str = "cpu",
) -> float:
    """How far ``precision`` takes a network from itself: the largest error by the largest output, the worst output.

    Args:
        model: in eval mode, in the precision it was trained in; not changed.
        inputs: positional tensors on the device of ``model``.
        precision: of weights and arithmetic.
        path: its ONNX file with the border in the type of ``inputs``, to run in onnxruntime; without it, torch
            runs the rounded network.
        device: of onnxruntime.

    >>> 0 < gap(nn.Linear(8, 8), [torch.randn(2, 8)], "fp16") < 2e-3
    True
    """
    truths = outputs_of(deep_copy(model).double(), [cast(value, torch.float64) for value in inputs])
    if path is None:
        results = outputs_of(Rounded(model, DTYPES[precision]), inputs)
    else:
        with Session(path, device) as session:
            results = session.run(*(value.to(session.device) for value in inputs))
    pairs = [(a.double().to(b.device), b) for a, b in zip(results, truths, strict=True) if b.is_floating_point()]
    return max((float((a - b).abs().max() / b.abs().max()) for a, b in pairs if bool(b.any())), default=0.0)


def cast_borders(graph: ir.Graph, inner: torch.dtype, outer: torch.dtype) -> None:
    """Let inputs and outputs of type ``inner`` be of type ``outer``, and cast behind and before them; names stay."""
    within, beyond = map(tensor_adapters.from_torch_dtype, (inner, outer))
    first = graph[0]
    for value in graph.inputs:
        if value.dtype == within:
            node = ir.node("Cast", [], {"to": within})
            ir.convenience.replace_all_uses_with(value, node.outputs[0], replace_graph_outputs=True)
            node.resize_inputs(1)
            node.replace_input_with(0, value)
            _describe(node.outputs[0], f"{value.name}_inner", within, value.shape)
            value.type = ir.TensorType(beyond)  # a new one: values share the old one
            graph.insert_before(first, node)
    for place, value in enumerate(graph.outputs):
        if value.dtype == within:
            node = ir.node("Cast", [value], {"to": beyond})
            _describe(node.outputs[0], value.name, beyond, value.shape)
            value.name = f"{value.name}_inner"
            graph.append(node)
            graph.outputs[place] = node.outputs[0]


def _describe(value: ir.Value, name: str | None, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), shape


def in_float32(path: Path, into: Path) -> None:
    """Write the graph of a bfloat16 file to ``into`` with every bfloat16 made float32, which changes no weight.

    Runtimes without kernels for bfloat16 can run this. It computes the same function, and rounds less on the way.
    """
    model = onnx.load(str(path))
    old, new = TensorProto.BFLOAT16, TensorProto.FLOAT
    for tensor in model.graph.initializer:
        if tensor.data_type == old:
            tensor.CopyFrom(_widened(tensor))
    for entry in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if entry.type.tensor_type.elem_type == old:
            entry.type.tensor_type.elem_type = new
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == old:
                attribute.i = new
            elif attribute.HasField("t") and attribute.t.data_type == old:
                attribute.t.CopyFrom(_widened(attribute.t))
    onnx.save(model, str(into), save_as_external_data=model.ByteSize() > 2**31 - 2**26)


def _widened(tensor: TensorProto) -> TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name)
